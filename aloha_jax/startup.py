"""What must be known before MuJoCo is imported."""

import importlib
import os
import sys


def require_opengl() -> None:
    """Import MuJoCo, which loads the OpenGL that MUJOCO_GL names; if it fails, exit with status 2 and one line."""
    try:
        importlib.import_module("mujoco")
    except Exception as error:  # whatever PyOpenGL and MuJoCo make of a library that is missing or misnamed
        choice = os.environ.get("MUJOCO_GL", "")
        reason = " ".join(str(error).split())
        remedy = "unset it, or set it to egl (libegl1) or osmesa (libosmesa6)"
        print(f"error: MUJOCO_GL={choice} does not work here ({reason}): {remedy}", file=sys.stderr)
        raise SystemExit(2) from None
