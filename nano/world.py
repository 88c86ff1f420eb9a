"""Nano's world: short drawn videos of small shapes, and the questions that can be asked about them.

Numpy only, so that evaluation needs no torch. A scene has one to four objects; every shape and every colour
occurs at most once in it, so that "the circle" and "the red object" name one object. Lengths are in pixels of
a 108-pixel frame, times in steps: a clip lasts eight steps, whatever its number of frames.

Questions (kind: form -> answer):

    color      what color is the circle ?                  -> red
    shape      what shape is the red object ?              -> circle
    direction  which direction does the red circle move ?  -> left | right | up | down | still
    count      how many objects are there ?                -> one | two | three | four
    presence   is there a red circle ?                     -> yes | no
    order      which object appears first ? (or last)      -> red circle
    position   where is the red circle ?                   -> top left | top | ... | bottom right
    brief      which object appears briefly ?              -> red circle | none   (or other forms)
    describe   describe the video .                        -> a red circle moves left . ...
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAME = 108  # pixels, the side of a frame at the world's own scale
STEPS = 8  # steps in a clip; the model looks at one frame of each
MAX_OBJECTS = 4
RADIUS = (5.5, 7.5)
SPEED = (5.5, 8.0)  # pixels per step

COLORS = {
    "red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
    "white": (240, 240, 240), "purple": (150, 40, 180), "orange": (240, 135, 20), "cyan": (60, 210, 225),
}  # fmt: skip
COLOR_NAMES = list(COLORS)
COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
SHAPE_NAMES = ["circle", "square", "triangle", "cross", "ring"]
MOTION_NAMES = ["left", "right", "up", "down", "still", "briefly"]
STILL, BRIEF = 4, 5
VELOCITY = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0)], np.float32)
MOTION_CHANCE = (0.18, 0.18, 0.18, 0.18, 0.28)
NUMBER_NAMES = ["zero", "one", "two", "three", "four"]
PLACE_NAMES = [
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
]  # fmt: skip
KINDS = ["color", "shape", "direction", "count", "presence", "order", "position", "brief", "describe"]


@dataclass
class Scene:
    """What happens in one clip. Arrays have one entry per object.

    Attributes:
        colors, shapes, motions: Indices into the name lists.
        radius: Pixels.
        start: (n, 2), centre (x, y) at time 0, pixels.
        velocity: (n, 2), pixels per step.
        appears, vanishes: The object is visible for appears <= time < vanishes, in steps.
        staggered: Whether objects enter one after another.
        tint: (n, 1), added to the colour.
        background: Grey level, and its change across the frame (x, y).
    """

    colors: np.ndarray
    shapes: np.ndarray
    motions: np.ndarray
    radius: np.ndarray
    start: np.ndarray
    velocity: np.ndarray
    appears: np.ndarray
    vanishes: np.ndarray
    staggered: bool
    tint: np.ndarray
    background: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.colors)

    @property
    def brief(self) -> int | None:
        """Index of the object that is visible for one or two steps only, if there is one."""
        found = np.flatnonzero(self.motions == BRIEF)
        return int(found[0]) if len(found) else None

    def name(self, i: int) -> str:
        """Colour and shape of an object, like "red circle"."""
        return f"{COLOR_NAMES[self.colors[i]]} {SHAPE_NAMES[self.shapes[i]]}"

    def centers(self, times: np.ndarray) -> np.ndarray:
        """Centres at these times (frames): (frames, n, 2), pixels."""
        return self.start + self.velocity * np.asarray(times, np.float32)[:, None, None]

    def place(self, i: int) -> str | None:
        """Which ninth of the frame object i rests in; None if it moves or is too near another ninth."""
        if self.motions[i] < STILL:
            return None
        third = FRAME / 3
        from_border = np.abs(self.start[i][:, None] - np.array([third, 2 * third])).min()
        if from_border < 3:
            return None
        column, row = (self.start[i] // third).astype(int)
        return PLACE_NAMES[row * 3 + column]


def sample_scene(rng: np.random.Generator, max_objects: int = MAX_OBJECTS) -> Scene:
    """Draw one scene at random."""
    n = int(rng.integers(1, max_objects + 1))
    colors = rng.permutation(len(COLOR_NAMES))[:n]
    shapes = rng.permutation(len(SHAPE_NAMES))[:n]
    motions = rng.choice(5, n, p=np.array(MOTION_CHANCE))
    appears = np.zeros(n, np.float32)
    vanishes = np.full(n, float(STEPS), np.float32)
    style = rng.random()
    staggered = n > 1 and style < 0.4
    if staggered:
        entrances = [0, *sorted(rng.choice(np.arange(2, 6), n - 1, replace=False))] if n < 4 else [0, 2, 4, 5]
        appears = np.array(entrances, np.float32)[rng.permutation(n)]
    elif n > 1 and style < 0.75:
        one = int(rng.integers(n))
        length = int(rng.integers(1, 3))
        motions[one] = BRIEF
        appears[one] = rng.integers(1, STEPS - length)
        vanishes[one] = appears[one] + length
    radius = rng.uniform(*RADIUS, n).astype(np.float32)
    velocity = VELOCITY[motions] * rng.uniform(*SPEED, (n, 1)).astype(np.float32)
    return Scene(  # arguments draw random numbers in this order
        colors=colors,
        shapes=shapes,
        motions=motions,
        radius=radius,
        start=_starts(rng, radius, velocity),
        velocity=velocity,
        appears=appears,
        vanishes=vanishes,
        staggered=staggered,
        tint=rng.uniform(-15, 15, (n, 1)).astype(np.float32),
        background=(float(rng.uniform(55, 125)), float(rng.uniform(-20, 20)), float(rng.uniform(-20, 20))),
    )


def _starts(
    rng: np.random.Generator, radius: np.ndarray, velocity: np.ndarray, candidates: int = 40
) -> np.ndarray:
    """Starting centres (n, 2): objects stay in the frame and never touch, if one of the candidates allows it.

    Half of the scenes take the tightest such candidate, so that objects often share a pooling window.
    """
    n = len(radius)
    travel = velocity * (STEPS - 0.5)
    low = radius[:, None] + 1 + np.maximum(-travel, 0)
    high = FRAME - radius[:, None] - 1 - np.maximum(travel, 0)
    starts = low + rng.random((candidates, n, 2)).astype(np.float32) * (high - low)
    if n == 1:
        return starts[0]
    times = np.arange(STEPS, dtype=np.float32)[:, None, None]
    centers = starts[:, None] + velocity * times  # candidates, steps, n, 2
    i, j = np.triu_indices(n, 1)
    gap = (np.linalg.norm(centers[:, :, i] - centers[:, :, j], axis=-1) - radius[i] - radius[j]).min((1, 2))
    free = np.flatnonzero(gap > 2)
    if not len(free):
        return starts[gap.argmax()]
    return starts[free[gap[free].argmin()]] if rng.random() < 0.5 else starts[free[0]]


def draw(
    scene: Scene, times: np.ndarray, rng: np.random.Generator, size: int = FRAME, noise: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Args:
        scene: The scene to draw.
        times: (frames), in steps.
        rng: Source of the noise.
        size: Side of a frame, pixels.
        noise: Standard deviation, grey levels.

    Returns:
        Frames (frames, size, size, 3) uint8, and owner (frames, size, size) int8: the object at each pixel,
        -1 for none.
    """
    times = np.asarray(times, np.float32)
    ramp = (np.arange(size, dtype=np.float32) / size - 0.5)[None, :]
    level, dx, dy = scene.background
    canvas = np.repeat((level + ramp * dx + ramp.T * dy)[None, :, :, None], 3, axis=3)
    canvas = np.repeat(canvas, len(times), axis=0)
    owner = np.full((len(times), size, size), -1, np.int8)
    for i in range(len(scene)):
        visible = np.flatnonzero((times >= scene.appears[i]) & (times < scene.vanishes[i]))
        if len(visible):
            _draw_object(scene, i, times, visible, canvas, owner)
    if noise:
        canvas += rng.standard_normal((len(times), size, size, 1), np.float32) * np.float32(noise)
    return np.clip(canvas, 0, 255).astype(np.uint8), owner


def _draw_object(
    scene: Scene, i: int, times: np.ndarray, visible: np.ndarray, canvas: np.ndarray, owner: np.ndarray
) -> None:
    """Draw object i with smooth edges into the frames where it is visible."""
    size = canvas.shape[1]
    scale = size / FRAME
    centers = (scene.centers(times) * scale)[visible, i]
    color = COLOR_VALUES[scene.colors[i]] + scene.tint[i]
    reach = int(np.ceil(scene.radius[i] * scale)) + 2
    corner = np.floor(centers).astype(int) - reach
    offset = np.arange(2 * reach + 2, dtype=np.float32) + 0.5
    x = (corner[:, :1] + offset - centers[:, :1]) / scale
    y = (corner[:, 1:] + offset - centers[:, 1:]) / scale
    distance = shape_distance(scene.shapes[i], x[:, None, :], y[:, :, None], scene.radius[i])
    alpha = np.clip(0.5 - distance * scale, 0, 1)
    width = len(offset)
    for k, t in enumerate(visible):
        left, top = corner[k]
        ys = slice(max(top, 0), min(top + width, size))
        xs = slice(max(left, 0), min(left + width, size))
        patch = alpha[k, ys.start - top : ys.stop - top, xs.start - left : xs.stop - left, None]
        canvas[t, ys, xs] += (color - canvas[t, ys, xs]) * patch
        owner[t, ys, xs][patch[..., 0] > 0.5] = i


def shape_distance(shape: int, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Rough distance in pixels from the outline of a shape of radius r around the origin; negative inside."""
    name = SHAPE_NAMES[shape]
    if name == "circle":
        return np.hypot(x, y) - r
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.3 * r
    if name == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if name == "triangle":
        return np.maximum(y - 0.75 * r, (np.abs(x) * 1.9 - y - r) / 2.15)
    ax, ay = np.abs(x), np.abs(y)  # cross
    return np.minimum(np.maximum(ax - r, ay - 0.32 * r), np.maximum(ax - 0.32 * r, ay - r))


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """Ask a question of one kind about a scene.

    Returns:
        Question and answer in the words above; None if the scene doesn't allow that kind.
    """
    i = int(rng.integers(len(scene)))
    if kind == "color":
        return f"what color is the {SHAPE_NAMES[scene.shapes[i]]} ?", COLOR_NAMES[scene.colors[i]]
    if kind == "shape":
        return f"what shape is the {COLOR_NAMES[scene.colors[i]]} object ?", SHAPE_NAMES[scene.shapes[i]]
    if kind == "direction":
        moving = np.flatnonzero(scene.motions != BRIEF)
        i = int(rng.choice(moving))
        return f"which direction does the {scene.name(i)} move ?", MOTION_NAMES[scene.motions[i]]
    if kind == "count":
        return "how many objects are there ?", NUMBER_NAMES[len(scene)]
    if kind == "presence":
        return _presence(scene, i, rng)
    if kind == "order":
        if not scene.staggered:
            return None
        last = rng.random() < 0.5
        i = int(scene.appears.argmax() if last else scene.appears.argmin())
        return f"which object appears {'last' if last else 'first'} ?", scene.name(i)
    if kind == "position":
        places = [(j, place) for j in range(len(scene)) if (place := scene.place(j))]
        if not places:
            return None
        i, place = places[rng.integers(len(places))]
        return f"where is the {scene.name(i)} ?", place
    if kind == "brief":
        return _about_brief(scene, rng)
    return "describe the video .", describe(scene)


def _presence(scene: Scene, i: int, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for an object that is there in half of the cases, else mostly for one of its colour or shape."""
    color, shape = scene.colors[i], scene.shapes[i]
    if rng.random() < 0.5:
        color = color if rng.random() < 0.45 else rng.integers(len(COLOR_NAMES))
        shape = shape if color != scene.colors[i] and rng.random() < 0.6 else rng.integers(len(SHAPE_NAMES))
    there = bool(((scene.colors == color) & (scene.shapes == shape)).any())
    return f"is there a {COLOR_NAMES[color]} {SHAPE_NAMES[shape]} ?", "yes" if there else "no"


def _about_brief(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    i = scene.brief
    if i is None:
        return ("which object appears briefly ?", "none") if not scene.staggered else None
    color, shape = COLOR_NAMES[scene.colors[i]], SHAPE_NAMES[scene.shapes[i]]
    forms = [
        ("which object appears briefly ?", f"{color} {shape}"),
        (f"what color is the {shape} ?", color),
        (f"what shape is the {color} object ?", shape),
        (f"is there a {color} {shape} ?", "yes"),
    ]
    return forms[rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])]


def describe(scene: Scene) -> str:
    """Describe a scene: one sentence per object, in the order of the shape names."""
    sentences = []
    for i in np.argsort(scene.shapes):
        sentences.append(f"a {scene.name(i)} {motion_words(int(scene.motions[i]))} .")
    return " ".join(sentences)


def motion_words(motion: int) -> str:
    """The motion of an object in words, like "moves left"."""
    return {STILL: "stays still", BRIEF: "appears briefly"}.get(motion, f"moves {MOTION_NAMES[motion]}")
