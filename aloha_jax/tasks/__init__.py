"""Tasks: start poses, official reward, dense reward and observation features, one file per task. Pure functions of arrays."""

from aloha_jax.scene import Scene
from aloha_jax.tasks.insertion import Insertion, Shaping

TASKS = {"insertion": Insertion}


def make_task(name: str, scene: Scene, shaping: Shaping | None = None) -> Insertion:
    """The task called `name` on its scene, under the dense reward that `shaping` asks for."""
    return TASKS[name](scene, shaping)
