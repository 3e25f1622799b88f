"""PPO in JAX that learns ALOHA peg insertion from camera pixels.

The Python surface (docs/environment.md): `make` builds a batched environment, `load_policy` loads what `train.py` saved,
`make_from_config` builds the environment that it was trained in.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import aloha_jax.startup  # noqa: F401 - first: it notes when the program began
from aloha_jax.gym import register

if TYPE_CHECKING:
    from aloha_jax.checkpoints import load_policy
    from aloha_jax.env import Env, EnvState
    from aloha_jax.factory import make, make_from_config
    from aloha_jax.policy import Policy
    from aloha_jax.tasks.insertion import StartRange
    from aloha_jax.tasks.potentials import Shaping

__all__ = ["Env", "EnvState", "Policy", "Shaping", "StartRange", "load_policy", "make", "make_from_config"]

# Physics and rendering on the CPU run in host callbacks. With asynchronous dispatch on the CPU backend, a callback can wait for a
# thread that waits for the callback (jax issues 24255 and 25861). The setting counts only before the first array is made.
if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_cpu_enable_async_dispatch", False)
else:
    os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")

register()

_HOMES = {
    "Env": "env",
    "EnvState": "env",
    "make": "factory",
    "make_from_config": "factory",
    "Policy": "policy",
    "load_policy": "checkpoints",
    "Shaping": "tasks.potentials",
    "StartRange": "tasks.insertion",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: whoever needs `startup` alone has yet to say where JAX keeps what it compiles."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"aloha_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aloha_jax' has no attribute {name!r}")
