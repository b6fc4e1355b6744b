"""The schema of the settings of a run: one dataclass a section, one comment a key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Data:
    """Which images, and how they are seen in training."""

    name: str = "digits"
    root: str | None = None  # None: FEDCL_DATA_ROOT, else ./data
    download: bool = False  # let torchvision download what is missing
    validation: float = 0.1  # share of each class's training images held out
    augment: list[str] = field(default_factory=list)  # names of fedcl.data.augment, e.g. [crop, flip]
    size: int | None = None  # resize images to size x size (pixels)
    limit: int | None = None  # at most this many training images a class (a quarter of it for test)
    domains: list[str] = field(default_factory=list)  # image folders: domains to use; empty: all
    memory_map: bool = False  # leave the images of an uncompressed .npz on disk, read only each batch


@dataclass
class Scenario:
    """The stream of tasks."""

    name: str = "class_incremental"
    tasks: int = 5
    base: int | None = None  # classes of the first task ("B50-Inc10": base=50, increment=10)
    increment: int | None = None  # classes of each later task
    first: int | None = None  # run only the first tasks of the stream
    order: str = "random"  # random | natural | seed1993 | given
    classes: list[int] = field(default_factory=list)  # the class order when order=given
    benchmark: str | None = None  # dotted name of a function that returns an Avalanche benchmark
    arguments: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    shift: str = "given"  # domain_incremental: given | permuted | rotated
    datasets: list[str] = field(default_factory=list)  # domain_incremental: more data sets, one a task after data.name
    own_classes: bool = False  # domain_incremental: the classes of each domain are classes of their own
    angles: list[float] = field(default_factory=list)  # shift=rotated: degrees of each task; empty: tasks over 180
    disjoint: float = 0.5  # i_blurry, si_blurry: share of the classes that belong to one task only (N)
    blurred: float = 0.1  # i_blurry, si_blurry: share of the other classes' images that change the task (M)
    overlap: float = 0.25  # linear_blurry: a transition starts and ends this far from its boundary (1: one class set)
    steps: int = 1  # linear_blurry: tasks that the time of one class set is cut into
    shots: int = 5  # few_shot: training images of each class after the base session (K)
    of: list[str] = field(default_factory=list)  # streams that others change (`fedcl show`); empty: class_incremental
    imbalance: float = 100.0  # long_tailed: images of the largest class over those of the smallest
    tail: str = "shuffled"  # long_tailed: shuffled | ordered (classes get rarer in the order of exposure)
    noise: str = "symmetric"  # noisy_labels: symmetric | asymmetric
    noise_rate: float = 0.2  # noisy_labels: share of each class's training labels that are wrong
    mixed: float = 0.5  # open_world, category_discovery: share of a class's images that come in later sessions
    labelled: float = 0.5  # open_world: share of the base classes' images in later sessions that are labelled


@dataclass
class Partition:
    """How each task's training images are split over the clients, and what clients are tested on."""

    name: str = "dirichlet"
    alpha: float = 0.5  # concentration of the Dirichlet partitions
    balance: bool = False  # TARGET/MOON rule: a client above the mean size gets no more
    min_size: int = 0  # redraw until the smallest client has this many images
    size: int = 0  # images a client draws of each task, independently of the others; 0: all are dealt out
    shards: int = 2  # shards a client
    classes: int = 2  # classes a client
    skew: float = 1.0  # quantity skew: Dirichlet concentration of the client sizes
    imbalance: float = 100.0  # long tail: images of the most frequent class over those of the rarest
    tail: str = "shuffled"  # long tail, which classes are rare: shuffled (by seed) | ordered (the later, the rarer)
    column: str = ""  # natural and feature_shift: column of the dataset, e.g. drawer; feature_shift: domain
    held_out: float = 0.0  # clients that never train and test as newcomers: a number, or a share below 1
    public: float = 0.0  # images of each class and task that are the server's: a number, or a share below 1
    test: str = "global"  # global | same_mix | holdout(p)


@dataclass
class Labels:
    """Which training images have a label; the others' labels are hidden from clients and strategies."""

    rate: float = 1.0  # share of each client's images of each class that is labelled; per=client: of the clients
    per: str = "sample"  # sample | client (all images of a client, or none)
    count: int | None = None  # labelled images of each class at each client and task, in place of rate
    batch_size: int = 0  # unlabelled images beside each batch of labelled ones; 0: federation.batch_size
    public: bool = True  # whether the server's own images (partition.public) have labels


@dataclass
class Model:
    """The shared encoder, its projector and its head."""

    name: str = "mlp"
    width: int | None = None  # hidden units, first-stage channels or token width; None: the network's own
    depth: int | None = None  # hidden layers (mlp) or blocks (tiny_vit); None: the network's own
    norm: str = "default"  # default | batch | group | layer | none
    projector: str = "auto"  # auto (when a strategy asks for one) | none | linear | mlp
    projector_dim: int = 128
    bias: bool = True  # of the layers of mlp, lenet, simple_cnn and alexnet; residual networks have none
    head: str = "linear"  # linear | cosine | nearest_mean | simplex
    head_bias: bool = True
    head_allocate: str = "grow"  # grow | all
    feature_norm: str = "none"  # of the features before the head: none | l2 | l2_sqrt | layer
    dropout: float = 0.0
    checkpoint: str | None = None  # local file with encoder weights (torchvision and timm models)
    batch_norm: str = "average"  # buffers of BatchNorm: average | local | frozen


@dataclass
class Federation:
    """Who trains, for how long, and how results are weighed."""

    clients: int = 5
    rounds: int = 5  # communication rounds a task
    participation: float = 1.0  # fraction of the clients in each round
    cohort: int = 0  # clients in each round, in place of participation; 0: by participation
    exchange: int | str = "auto"  # whom a strategy's own exchange reaches: auto | all | trained | a number drawn anew
    weighting: str = "samples"  # samples | uniform
    epochs: int | None = None  # local epochs a round; exactly one of epochs and steps is set
    steps: int | None = None  # local steps a round
    passes: str = "many"  # over a task's images: many (all in every round) | once (round r sees the r-th chunk)
    repeats: int = 1  # passes=once: steps on each batch, one after the other
    batch_size: int = 32
    drop_last: bool = False
    batch_min: int = 0  # smaller batches are left out; 0: 2 for networks with BatchNorm, else 1


@dataclass
class Time:
    """When each client meets its tasks, who is there, and how fast clients are."""

    order: str = "common"  # common | asynchronous (own order of the tasks) | client_specific (own classes)
    sequence: str = "shuffled"  # asynchronous: shuffled | lagged (the common order, begun at a task of its own)
    classes: int = 2  # client_specific: classes in each task of a client
    shared: float = 0.0  # client_specific: share of a client's classes that all clients have in common
    joining: float = 0.0  # share of the clients that come only after the first task
    leaving: float = 0.0  # share of the clients that go before the last task
    start: int = 0  # growing federation: clients in the first task; 0: all
    growth: int = 0  # growing federation: clients that come with each further task
    participation: float = 1.0  # share of the clients then there that take part in a task at all, drawn for each task
    stragglers: float = 0.0  # share of the clients that are slow
    slowdown: float = 2.0  # how many times longer a step takes them
    straggler_policy: str = "wait"  # wait | partial (they do fewer steps) | drop (their update comes too late)


@dataclass
class Optimiser:
    """The clients' optimiser."""

    name: str = "sgd"  # sgd | adam | adamw
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip: float | None = None  # norm of the gradient
    schedule: str = "constant"  # constant | cosine | linear | step
    per: str = "round"  # what the schedule counts: step | round | task
    warmup: int = 0  # steps, rounds or tasks of linear warm-up
    milestones: list[int] = field(default_factory=list)  # for schedule=step
    gamma: float = 0.1  # factor at each milestone
    final: float = 0.0  # last learning rate of cosine and linear, as a fraction of lr


@dataclass
class Engine:
    """How the numbers are computed; never what is computed."""

    runtime: str = "local"  # local | ray | deploy
    device: str = "auto"  # auto | cpu | cuda[:i]
    path: str = "auto"  # auto | stacked | sequential
    chunk: int = 0  # clients in a stack; 0: the whole cohort of a node
    dtype: str = "float32"  # float32 | float64 | bf16
    threads: int = 0  # 0: the number of physical cores this process may use
    memory_format: str = "auto"  # auto | contiguous | channels_last
    deterministic: bool = True
    timeout: float = 3600.0  # seconds an exchange may take
    nodes: int = 0  # ray: actors; deploy: SuperNodes to wait for; 0: chosen at the start
    client_cpus: float = 0.0  # ray: processors an actor reserves; 0: its share of this machine
    client_gpus: float = 0.0  # ray: GPUs an actor reserves, fractions allowed; 0: its share where device is cuda
    address: str | None = None  # ray: a running cluster (auto, HOST:PORT); deploy: the SuperLink's HOST:PORT


@dataclass
class Evaluate:
    """When and how the model is tested."""

    every: int = 0  # rounds between evaluations into rounds.csv; 0: only after each task
    batch_size: int = 1024
    on: str = "test"  # test | validation (held-out training images; no test image is read)
    personal: bool = True  # also each client on its own test set, where it has one
    probes: list[str] = field(default_factory=list)  # of the frozen encoder after each task: see `fedcl list probes`
    probe_samples: int = 20  # images of a class and task that probes train on, and compare one with another; 0: all
    predict: str = "auto"  # what is accurate: head (the stack's own rule) | knn | linear | nearest_mean (probes) | auto
    top: int = 1  # a test image is right where its class is among this many best scores
    flops: bool = True  # count the FLOPs of training: one step more for each shape of batch and task
    features: int = 0  # test images whose features are kept after each task, for `fedcl plot features`; 0: none


@dataclass
class Checkpoint:
    """When the state is saved."""

    every: int = 10  # rounds between checkpoints inside a task; 0: only after each task
    keep: int = 2


@dataclass
class Output:
    """Where results go: ``dir/name/seed-N``."""

    dir: str = "runs"
    plots: bool = True
    loggers: list[str] = field(default_factory=list)  # tensorboard, wandb (offline); events.jsonl is always written
    callbacks: list[str] = field(default_factory=list)  # functions told of each round, package.module:name


@dataclass
class Protocol:
    """The record of a followed protocol: what ``protocol=NAME`` leaves in ``config.yaml``."""

    name: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)  # dotted key -> the protocol's value
    varies: dict[str, Any] = field(default_factory=dict)  # dotted key -> values that its source compares


@dataclass
class Config:
    """A whole run."""

    name: str = "run"
    seed: int = 0
    data: Data = field(default_factory=Data)
    scenario: Scenario = field(default_factory=Scenario)
    partition: Partition = field(default_factory=Partition)
    labels: Labels = field(default_factory=Labels)
    model: Model = field(default_factory=Model)
    strategy: list[str] = field(default_factory=lambda: ["finetune"])
    options: dict[str, Any] = field(default_factory=dict)
    federation: Federation = field(default_factory=Federation)
    time: Time = field(default_factory=Time)
    optimiser: Optimiser = field(default_factory=Optimiser)
    engine: Engine = field(default_factory=Engine)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    output: Output = field(default_factory=Output)
    init: str | None = None
    plugins: list[str] = field(default_factory=list)
    protocol: Protocol = field(default_factory=Protocol)
