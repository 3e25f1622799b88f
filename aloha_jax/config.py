"""The configuration of a run: its settings, which are also the command line (tyro), their checks, and `config.json`."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from aloha_jax.settings import Settings
from aloha_jax.typed_json import typed

FORMAT_VERSION = 1  # of config.json and of checkpoints
RETIRED = frozenset({"carry"})  # settings of earlier versions that a policy can do without

LEARNING_RATE_BOUNDS = (1e-5, 2e-3)  # of the adaptive schedule
MAX_EPISODES = 100_000  # that are judged at a time
MIN_BIN = 8  # samples that --advantage-bins leaves for each
MAX_START_SHIFT = 0.035  # metres; peg and socket, corners up to 6.4 cm from their centres, then start at least 13 cm apart
MAX_POSE_NOISE = 0.05  # metres; peg and socket are 12 cm long
MAX_CAMERA_SHIFT = 0.2  # metres; the camera hangs 0.8 m above the table
MAX_DYNAMICS_FACTOR = 4  # on friction and masses
MAX_LAG = 300  # control steps that --history may look back; gym_aloha's episodes have as many


class ConfigError(ValueError):
    """A setting is wrong; the message says which, and what to do."""


def require_single_precision() -> None:
    """Every array here, from simulators to checkpoints, has the types that JAX has by default.

    Raises:
        ConfigError: JAX has been told to compute with 64 bits.
    """
    import jax

    if jax.numpy.result_type(float) != "float32":
        raise ConfigError("aloha_jax computes in single precision: unset JAX_ENABLE_X64, or set jax_enable_x64 to False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The settings of a run: frozen, checked by `validate`, and `config.json`."""

    def validate(self) -> "Config":
        """Self, if every setting and combination makes sense.

        Raises:
            ConfigError: naming the flag and the remedy.
        """
        sizes = ("total_timesteps", "n_envs", "n_steps", "batch_size", "n_epochs", "features_dim", "episode_length")
        for name in (*sizes, "checkpoint_freq", "eval_freq", "eval_episodes"):
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "clip_range"):
            _require(0 < getattr(self, name) < float("inf"), name, "must be positive and finite", getattr(self, name))
        for name in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, name) <= 1, name, "must lie in 0..1", getattr(self, name))
        for name in ("eval_episodes", "final_eval_episodes"):
            _require(getattr(self, name) <= MAX_EPISODES, name, f"must be at most {MAX_EPISODES}", getattr(self, name))
        costs = ("ent_coef", "vf_coef", "ppo_coef", "distill_coef", "state_coef", "action_cost", "action_change_cost")
        for name in (*costs, "final_eval_episodes"):
            _require(0 <= getattr(self, name) < float("inf"), name, "must not be negative", getattr(self, name))
        for name, value in vars(self).items():  # JAX counts in 32 bits
            small = not isinstance(value, int) or name == "seed" or abs(value) < 2**31
            _require(small, name, "must be less than 2^31", value)
        _require(self.rollout_size < 2**31, "n_steps", f"times --n-envs {self.n_envs} must be less than 2^31", self.n_steps)
        for name in ("log_dir", "resume"):
            path = getattr(self, name) or "."
            _require(path.isprintable(), name, "must consist of printable characters", ascii(path))
        _require(0 <= self.seed < 2**32, "seed", "must lie in 0..2^32 - 1", self.seed)
        _require(0 <= self.average_decay < 1, "average_decay", "must lie in 0..1, below 1", self.average_decay)
        _require(abs(self.log_std_init) < float("inf"), "log_std_init", "must be finite", self.log_std_init)
        recent = all(1 <= lag <= MAX_LAG for lag in self.history)
        _require(recent, "history", f"must consist of numbers of steps in 1..{MAX_LAG}", self.history)
        final = self.log_std_final
        _require(final is None or -20 <= final <= self.log_std_init, "log_std_final", "must lie in -20..--log-std-init", final)
        _require(min(self.hidden_sizes, default=1) >= 1, "hidden_sizes", "must be at least 1", self.hidden_sizes)
        limits = ("action_clip", "clip_range_vf", "target_kl", "microbatch_size", "keep_period")
        for name in (*limits, "grip_tolerance", "grip_height_tolerance"):
            positive = getattr(self, name) is None or 0 < getattr(self, name) < float("inf")
            _require(positive, name, "must be positive and finite", getattr(self, name))
        self._validate_task()
        self._validate_teacher()
        self._validate_backends()
        self._validate_pixels()
        self._validate_batches()
        return self

    def _validate_task(self) -> None:
        height = self.grip_height_tolerance
        other = "must be None with --grip-tolerance, which asks for another height"
        _require(height is None or self.grip_tolerance is None, "grip_height_tolerance", other, height)
        for name in ("start_share", "delay_share"):
            _require(0 <= getattr(self, name) <= 1, name, "must lie in 0..1", getattr(self, name))
        for name in ("friction_factor", "mass_factor"):
            factor = getattr(self, name)
            _require(1 <= factor <= MAX_DYNAMICS_FACTOR, name, f"must lie in 1..{MAX_DYNAMICS_FACTOR}", factor)
            _require(factor == 1 or self.engine != "mjx", name, "needs --engine c: MJX's worlds share one model", factor)
        noise = f"must lie in 0..{MAX_POSE_NOISE} m"
        _require(0 <= self.pose_noise <= MAX_POSE_NOISE, "pose_noise", noise, self.pose_noise)
        _require(not self.pose_noise or not self.has_pixels, "obs", "must be state with --pose-noise", self.obs)
        _require(0 <= self.start_yaw <= 180, "start_yaw", "must lie in 0..180 degrees", self.start_yaw)
        apart = f"must lie in 0..{MAX_START_SHIFT} m, or peg and socket might start in each other"
        _require(0 <= self.start_shift <= MAX_START_SHIFT, "start_shift", apart, self.start_shift)

    def _validate_backends(self) -> None:
        mjx = self.engine == "mjx"
        _require(mjx or self.impl == "auto", "impl", "is for --engine mjx, whose implementations it chooses between", self.impl)
        own = "is fast for --impl jax, which has a collision model of its own"
        _require(self.impl != "jax" or self.physics == "fast", "physics", own, self.physics)

    def _validate_teacher(self) -> None:
        for name in ("teacher_mix", "teacher_mix_final", "distill_coef_final"):
            value = getattr(self, name)
            highest = 1 if "mix" in name else float("inf")
            _require(value is None or (0 <= value <= highest and value < float("inf")), name, f"must lie in 0..{highest}", value)
        _require(
            not self.learns_from_teacher or self.teacher is not None,
            "teacher",
            "is needed by --distill-coef and --teacher-mix",
            self.teacher,
        )
        aimless = not (self.ppo_coef or self.distill_coef or self.distill_coef_final)
        _require(not aimless, "ppo_coef", "must be positive unless --distill-coef is", self.ppo_coef)

    def _validate_batches(self) -> None:
        rollout = f"--n-envs {self.n_envs} x --n-steps {self.n_steps} = {self.rollout_size}"
        _require(self.rollout_size % self.batch_size == 0, "batch_size", f"must divide {rollout}", self.batch_size)
        micro = self.microbatch_size
        _require(
            micro is None or self.batch_size % micro == 0, "microbatch_size", f"must divide --batch-size {self.batch_size}", micro
        )
        alone = self.batch_size == 1 and self.normalize_advantage
        _require(not alone, "batch_size", "must be above 1 with --normalize-advantage, which compares samples", 1)
        bins = self.advantage_bins
        even = bins >= 1 and self.batch_size % bins == 0
        _require(even, "advantage_bins", f"must be positive and divide --batch-size {self.batch_size}", bins)
        room = bins == 1 or self.batch_size >= MIN_BIN * bins  # of one or two samples nothing but signs is left
        _require(room, "advantage_bins", f"must leave {MIN_BIN} of --batch-size {self.batch_size} for each", bins)
        _require(bins == 1 or self.normalize_advantage, "advantage_bins", "needs --normalize-advantage", bins)
        adaptive = self.lr_schedule == "adaptive"
        _require(not adaptive or self.target_kl is not None, "lr_schedule", "adaptive needs --target-kl", self.lr_schedule)
        low, high = LEARNING_RATE_BOUNDS
        bounded = not adaptive or low <= self.learning_rate <= high
        _require(bounded, "learning_rate", f"must lie in {low}..{high} with --lr-schedule adaptive", self.learning_rate)
        acts = not adaptive or 1 not in (self.teacher_mix, self.teacher_mix_final)
        _require(acts, "teacher_mix", "must be below 1 with --lr-schedule adaptive, which follows the policy's own steps", 1)

    def _validate_pixels(self) -> None:
        _require(1 <= self.image_height <= 480, "image_height", "must lie in 1..480", self.image_height)
        _require(1 <= self.image_width <= 640, "image_width", "must lie in 1..640", self.image_width)
        if self.crop is not None:
            top, left, height, width = self.crop
            inside = 0 <= top and 0 <= left and 1 <= height <= 480 - top and 1 <= width <= 640 - left
            _require(inside, "crop", "(top left height width) must lie inside the 480x640 frame", self.crop)
        _require(0 <= self.random_shift <= 100, "random_shift", "must lie in 0..100", self.random_shift)
        _require(0 <= self.color_jitter < 1, "color_jitter", "must lie in 0..1, below 1", self.color_jitter)
        off = f"must lie in 0..{MAX_CAMERA_SHIFT} m"
        _require(0 <= self.camera_shift <= MAX_CAMERA_SHIFT, "camera_shift", off, self.camera_shift)
        changed = self.random_shift or self.color_jitter or self.camera_shift
        flags = "--random-shift, --color-jitter or --camera-shift"
        _require(not changed or self.has_pixels, "obs", f"must have pixels with {flags}", self.obs)
        beside = self.history or self.observe_target or self.privileged_critic
        flags = "--history, --observe-target or --privileged-critic"
        without = f"must have pixels with {flags}, which --preset state does without"
        _require(not beside or self.has_pixels, "obs", without, self.obs)
        _require(not self.state_coef or self.privileged_critic, "state_coef", "needs --privileged-critic", self.state_coef)
        if self.has_pixels:
            height, width = self.image_height, self.image_width
            for features, kernel, stride in self.conv:
                _require(min(features, kernel, stride) >= 1, "conv", "needs positive features, kernel, stride", self.conv)
                height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
                hint = f"shrinks a {self.image_height}x{self.image_width} picture to nothing: enlarge it or shrink the kernels"
                _require(height >= 1 and width >= 1, "conv", hint, self.conv)

    def to_json(self) -> str:
        """The configuration as JSON, with the format's version."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> "Config":
        """The configuration that `to_json` wrote.

        Raises:
            ConfigError: not JSON, another format version, an unknown or ill-typed setting, or one that `validate` refuses.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{source} must hold a JSON object")
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(f"{source} has format version {version}; this program reads version {FORMAT_VERSION}")
        hints = typing.get_type_hints(cls)
        values = {name: value for name, value in values.items() if name not in RETIRED}
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ConfigError(f"{source} has unknown settings: {', '.join(unknown)}")
        try:
            settings = {name: typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls(**settings).validate()

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a config.json.

        Raises:
            ConfigError: the file is missing, unreadable or wrong.
        """
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        return cls.from_json(text, str(path))


def _require(condition: bool, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise ConfigError(f"--{name.replace('_', '-')} {rule}, got {value}")
