"""Tasks: start poses, official reward, observation features, and the dense reward, whose terms are in `potentials`."""

from aloha_jax.scene import Scene
from aloha_jax.tasks.insertion import Insertion, StartRange
from aloha_jax.tasks.potentials import Shaping

TASKS = {"insertion": Insertion}


def make_task(name: str, scene: Scene, shaping: Shaping | None = None, start_range: StartRange | None = None) -> Insertion:
    """The task called `name` on its scene, under the dense reward that `shaping` asks for, from starts in `start_range`."""
    return TASKS[name](scene, shaping, start_range)
