"""Tasks: start poses, official reward, dense reward and observation features, one file per task. Pure functions of arrays."""

from aloha_jax.scene import Scene
from aloha_jax.tasks.insertion import Insertion

TASKS = {"insertion": Insertion}


def make_task(name: str, scene: Scene, action_change_cost: float = 0.0) -> Insertion:
    """The task called `name` on its scene; the cost is that of the dense reward per unit squared."""
    return TASKS[name](scene, action_change_cost)
