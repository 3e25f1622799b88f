"""Fewer triangles for the same silhouette: vertex clustering with quadric-optimal representatives.

Software OpenGL spends most of a small picture on vertices that fall into the same pixel. Clustering (Lindstrom, "Out-of-core
simplification of large polygonal models", 2000) needs no topology, no dependency and a few milliseconds per mesh.
"""

import numpy as np


def cluster_vertices(vertices: np.ndarray, faces: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Merges all vertices of a grid cell into the point that lies closest to the planes of their faces.

    Args:
        vertices: float[V, 3], metres.
        faces: int[F, 3], indices of vertices, counter-clockwise seen from outside.
        cell: edge of a grid cell, metres. No vertex moves further than its cell's diagonal plus `cell`.

    Returns:
        The vertices float[v, 3] and faces int[f, 3] of the coarser mesh, without collapsed or repeated faces.
    """
    _, cluster = np.unique(np.floor(vertices / cell).astype(int), axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    centres = _cluster_means(vertices, cluster)
    offsets = _towards_planes(centres, *_plane_quadrics(vertices, faces, cluster, len(centres)))
    length = np.linalg.norm(offsets, axis=1, keepdims=True)
    # In a nearly flat cell the planes do not pin the point down and the solution may lie far away.
    offsets *= np.minimum(1.0, cell / np.maximum(length, 1e-12))
    return centres + offsets, _distinct_faces(cluster[faces])


def _cluster_means(vertices: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    sums = np.stack([np.bincount(cluster, weights=axis) for axis in vertices.T], axis=1)
    return sums / np.bincount(cluster)[:, None]


def _plane_quadrics(vertices: np.ndarray, faces: np.ndarray, cluster: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A[c, 3, 3] and b[c, 3] of the squared, area-weighted distances x'Ax - 2b'x + const to the planes that meet in a cluster."""
    corner, right, left = (vertices[faces[:, i]] for i in range(3))
    normals = np.cross(right - corner, left - corner)
    heights = np.sum(normals * corner, axis=1, keepdims=True)
    quadratic, linear = np.zeros((count, 3, 3)), np.zeros((count, 3))
    for i in range(3):
        np.add.at(quadratic, cluster[faces[:, i]], normals[:, :, None] * normals[:, None, :])
        np.add.at(linear, cluster[faces[:, i]], heights * normals)
    return quadratic, linear


def _towards_planes(centres: np.ndarray, quadratic: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """The shortest offsets [c, 3] from the centres that minimise the quadrics; directions the planes leave free stay put."""
    residual = linear - np.einsum("cij,cj->ci", quadratic, centres)
    return np.einsum("cij,cj->ci", np.linalg.pinv(quadratic, rcond=1e-2, hermitian=True), residual)


def _distinct_faces(faces: np.ndarray) -> np.ndarray:
    """Drops faces that lost a corner and repeats of the same oriented triangle."""
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (c != a)]
    first = np.argmin(faces, axis=1)
    rotation = (first[:, None] + np.arange(3)) % 3
    return np.unique(np.take_along_axis(faces, rotation, axis=1), axis=0)
