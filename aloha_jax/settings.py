"""The settings of a run, with the help that `train.py --help` prints."""

import dataclasses
from typing import Literal

NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # features, kernel, stride: Mnih et al. 2015, as in Stable-Baselines3

# The table between the arms in gym_aloha's 480x640 frame: (top, left, height, width) in pixels. Its centre is the arms' centre,
# so that a half turn of the picture exchanges the arms.
WORK_AREA = (196, 180, 168, 280)

# Presets; those of the second stage go on from another run.
FirstStage = Literal["auto", "cpu", "gpu", "state", "scratch", "pixels", "pixels-ppo", "smoke", "guide"]
LaterStage = Literal["polish", "pixels-polish", "pixels-finetune", "pixels-ppo-polish", "gpu-polish"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a run. Each field is a flag of `train.py`; the text under it is the flag's help. Checked: `Config`."""

    # --- The run
    preset: Literal[FirstStage, LaterStage] = "auto"
    """Defaults for everything below; `auto` takes `gpu` if JAX sees one, else `cpu`."""
    log_dir: str = "runs/insertion"
    """The run's directory: checkpoints, TensorBoard, evaluations, videos."""
    resume: str | None = None
    """Go on with the run in this directory, under its saved configuration."""
    init_from: str | None = None
    """Start with the parameters of this run or model, which must have the same networks."""
    overwrite: bool = False
    """Delete what is in --log-dir first."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the learner runs."""
    profile: str | None = None
    """Write a JAX profile of three updates into this directory."""
    seed: int = 0
    """Seeds networks, start poses, exploration and shuffling."""

    # --- The environment
    task: Literal["insertion"] = "insertion"
    """What to learn."""
    obs: Literal["pixels", "pixels_agent_pos", "state"] = "pixels_agent_pos"
    """What the policy sees: the top camera, the camera and 14 joint positions, or the simulator's state."""
    observe_target: bool = False
    """With pixels, the policy also sees the 14 joint targets that it commanded last."""
    history: tuple[int, ...] = ()
    """With pixels, the policy also sees its joint positions (with --obs pixels its targets) of so many steps ago, 4 8 16 say."""
    image_height: int = 48
    """Height of the policy's picture, 1..480."""
    image_width: int = 80
    """Width of the policy's picture, 1..640."""
    crop: tuple[int, int, int, int] | None = WORK_AREA
    """Top, left, height and width in gym_aloha's 480x640 frame, resized to the picture; None: the whole frame."""
    random_shift: int = 0
    """In training each picture is moved by up to so many pixels along either axis."""
    color_jitter: float = 0.0
    """In training brightness and contrast of each picture are changed by factors in 1 +- this."""
    camera_shift: float = 0.0
    """Metres, along x and y, by which the camera may be off its place, each training episode anew; in gym_aloha it never is."""
    delay_share: float = 0.0
    """Share of the training episodes in which actions take effect one control step late; in gym_aloha they never do."""
    friction_factor: float = 1.0
    """In training worlds differ in friction, by factors in 1/f..f, for f = 2 from half to twice gym_aloha's. Needs C MuJoCo."""
    mass_factor: float = 1.0
    """In training they differ in mass and inertia of peg and socket, likewise."""
    pose_noise: float = 0.0
    """With --obs state, metres that objects seem off their place in training, to policy and critic, normally distributed, each
    episode anew; they seem turned, too, by a degree per millimetre."""
    action: Literal["delta", "absolute"] = "delta"
    """Changes of the joint targets, or gym_aloha's absolute joint targets."""
    action_clip: float | None = 3.0
    """Sampled actions are clipped to +- this before they reach the environment."""
    reward: Literal["dense", "shaped", "sparse"] = "dense"
    """Training reward: potentials (docs/learning.md), the guide's bonuses, or gym_aloha's own."""
    action_cost: float = 0.0005
    """What the dense reward takes, halved, for the squared action (0.01 makes a policy that succeeds slow)."""
    action_change_cost: float = 0.0
    """What the dense reward takes, halved, for the squared change of the action (0.01 makes a policy that succeeds smooth)."""
    grip_tolerance: float | None = None
    """Metres; a hold that far from the nominal grip counts 56 %, far away 30 %. None: all, or with --teacher as its own."""
    grip_height_tolerance: float | None = None
    """Metres; lifting pays half where an object is held that far over or under where fingers on the table take it. None: all."""
    engine: Literal["auto", "c", "mjx"] = "auto"
    """Physics: C MuJoCo on CPU threads (auto, on every machine), or MJX on the accelerator."""
    impl: Literal["auto", "jax", "warp"] = "auto"
    """Implementation of mjx: NVIDIA Warp's kernels (CUDA, CPU), or XLA alone with simpler collisions; auto: warp if it runs."""
    physics: Literal["fast", "exact"] = "fast"
    """4 x 0.005 s with a capped solver, or gym_aloha's own 10 x 0.002 s."""
    renderer: Literal["auto", "egl", "warp"] = "auto"
    """Where pixels come from: OpenGL, ray tracing on the learner's device; auto: where the physics is, else what works here."""
    render_quality: Literal["fast", "shadows", "exact"] = "fast"
    """Cheap visuals, the same with coarse shadows (three fifths of the speed), or gym_aloha's own (slow)."""
    double_buffer: bool = True
    """Whether OpenGL draws one half of the worlds while the other half decides and moves. Needs an even --n-envs, and not
    `--start-states archive`; without effect on pictures drawn on the learner's device."""
    episode_length: int = 300
    """Control steps (50 Hz) after which an episode is truncated; gym_aloha's is 300."""
    start_states: Literal["task", "expert", "archive"] = "task"
    """Where training episodes start: as the task does, or a share along the expert's episodes, or where the policy has been."""
    start_share: float = 0.5
    """Share of episodes that start in such states."""
    start_yaw: float = 0.0
    """Degrees, either way, by which training episodes turn peg and socket at their start (not the expert's); gym_aloha: 0."""
    start_shift: float = 0.0
    """Metres, along x and y, by which they may start outside gym_aloha's range."""

    # --- Learning from a teacher (DAgger, Ross et al. 2011), alone or beside PPO
    teacher: str | None = None
    """A run or model trained with --obs state, whose actions the policy is to imitate."""
    distill_coef: float = 0.0
    """Weight of the squared difference to the teacher's action."""
    distill_coef_final: float | None = None
    """What --distill-coef changes to, linearly over the run; None: it does not."""
    ppo_coef: float = 1.0
    """Weight of PPO's own objective for the policy, entropy bonus included; 0 with a teacher is DAgger."""
    teacher_mix: float = 0.0
    """Share of the steps in which the teacher acts instead of the policy."""
    teacher_mix_final: float | None = None
    """What --teacher-mix changes to, linearly over the run; None: it does not."""

    # --- PPO
    total_timesteps: int = 1_000_000
    """Environment steps to train for, over all worlds."""
    n_envs: int = 64
    """Worlds stepped as one batch."""
    n_steps: int = 32
    """Steps per world and update."""
    batch_size: int = 512
    """Samples per minibatch."""
    microbatch_size: int | None = None
    """Samples whose gradient is computed at once; smaller needs less memory and changes nothing else."""
    n_epochs: int = 4
    """Passes over each rollout."""
    state_coef: float = 0.0
    """Weight of the error in predicting the simulator's state, on which the policy then acts. Needs --privileged-critic."""
    learning_rate: float = 3e-4
    """Adam's step size (at the start, if scheduled)."""
    lr_schedule: Literal["constant", "linear", "adaptive"] = "constant"
    """Keep it, anneal it to zero, or raise and lower it to hold the KL divergence near --target-kl."""
    gamma: float = 0.985
    """Discount per step."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    clip_range: float = 0.2
    """Clip of the probability ratio."""
    clip_range_vf: float | None = None
    """Clip of the change of the value; None: none."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this global norm."""
    target_kl: float | None = None
    """Stop an update early above 1.5 times this divergence (`adaptive` schedule: the divergence to hold instead)."""
    normalize_advantage: bool = True
    """Whiten advantages per minibatch."""
    advantage_bins: int = 1
    """Whiten them among samples of like value, in so many bins of equally many; 1: all together."""
    average_decay: float = 0.0
    """Judge and save a running average of the parameters with this decay per update (0.99, say); 0: the parameters themselves."""

    # --- Networks
    network: Literal["joint", "mirrored"] = "joint"
    """One policy for all 14 joints, or one that both arms share, each with its own reward and value."""
    conv: tuple[tuple[int, int, int], ...] = NATURE_CNN
    """Convolutions of the encoder: features, kernel, stride."""
    features_dim: int = 512
    """Size of the encoder's output."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Hidden layers of the policy head and, separately, of the value head."""
    activation: Literal["relu", "elu", "tanh"] = "tanh"
    """Activation of the heads."""
    privileged_critic: bool = False
    """The value head sees the simulator's state instead of the observation (training only)."""
    log_std_init: float = 0.0
    """Initial log standard deviation. A policy from --init-from has its own; this says where its cap begins."""
    log_std_final: float | None = None
    """Cap on the log standard deviation, which falls linearly from --log-std-init to this over the run; None: none."""
    normalize_obs: bool = True
    """Whiten vector observations by running statistics."""

    # --- Records
    checkpoint_freq: int = 100_000
    """Environment steps between checkpoints."""
    keep_period: int | None = None
    """Keep the first checkpoint at or after each multiple of so many environment steps, beside the newest three and the best."""
    eval_freq: int = 50_000
    """Environment steps between evaluations during training, in the training engine."""
    eval_episodes: int = 16
    """Episodes of each evaluation during training."""
    final_eval_episodes: int = 10
    """Episodes of the evaluation in gym_aloha after training; 0: none."""
    final_video: bool = True
    """Film the first of them."""

    # --- Derived values

    @property
    def rollout_size(self) -> int:
        """Environment steps per update."""
        return self.n_envs * self.n_steps

    @property
    def num_updates(self) -> int:
        """Updates of the run: the fewest that reach `total_timesteps`."""
        return -(-self.total_timesteps // self.rollout_size)

    @property
    def has_pixels(self) -> bool:
        """Whether anything must be rendered."""
        return self.obs != "state"

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a teacher has a say at any time of the run."""
        return any((self.distill_coef, self.distill_coef_final, self.teacher_mix, self.teacher_mix_final))
