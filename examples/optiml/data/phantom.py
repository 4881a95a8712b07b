"""Chest-like phantoms: X-rays of nobody, with findings whose class, box and mask are known.

The images are drawn, not photographed: overlapping soft shapes add up to an attenuation map, which an
"exposure" turns into grey values. They are meant to be *hard in the right way*: pose, body size, heart size,
exposure, bones, vessels, cables and noise vary far more than the findings do, so that a network which has
learned nothing (whose features see mostly brightness and coarse layout) scores badly, while one that has
learned to look at the lungs scores well.

Everything follows from ``(seed, patient, visit)``: the same three numbers give the same pixels, whatever was
drawn before. Visits of one patient share the anatomy, which is why splits must go by patient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: The drawn findings; a subset of ChestX-ray14's fourteen, so that phantoms and real films share one label set.
PHANTOM_CLASSES = ("Cardiomegaly", "Consolidation", "Effusion", "Mass", "Nodule", "Pneumothorax")

Grid = NDArray[np.float32]


@dataclass
class Phantom:
    """One drawn film: grey values (uint8, square), findings, and one boolean mask per finding."""

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return sorted(self.masks)

    def box(self, label: str) -> tuple[int, int, int, int]:
        """The tight (x, y, width, height) of a finding, in pixels."""
        rows, cols = np.nonzero(self.masks[label])
        x, y = int(cols.min()), int(rows.min())
        return x, y, int(cols.max()) - x + 1, int(rows.max()) - y + 1


def _soft(distance: Grid, width: float) -> Grid:
    """A soft step: 1 well inside (negative distance), 0 well outside."""
    return 1.0 / (1.0 + np.exp(np.clip(distance / width, -30.0, 30.0)))


def _ellipse(x: Grid, y: Grid, cx: float, cy: float, rx: float, ry: float, power: float = 2.0) -> Grid:
    """Signed pseudo-distance to a super-ellipse: negative inside, about linear near its edge."""
    r = (np.abs((x - cx) / rx) ** power + np.abs((y - cy) / ry) ** power) ** (1.0 / power)
    return (r - 1.0) * min(rx, ry)


def _clouds(rng: np.random.Generator, size: int, cells: int, octaves: int = 2) -> Grid:
    """Smooth random field with zero mean and unit deviation: noise on a coarse grid, enlarged."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        coarse = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
        total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    return (total - total.mean()) / (total.std() + 1e-6)


def draw(seed: int, patient: int, visit: int, size: int = 128, prevalence: float = 0.22) -> Phantom:
    """Draw the film of one visit; every finding appears independently with probability ``prevalence``."""
    body = np.random.default_rng([seed, patient])  # the anatomy, the same at every visit
    rng = np.random.default_rng([seed, patient, visit, 1])  # the day: pose, exposure, findings, noise
    axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    px, py = np.meshgrid(axis, axis)

    # Pose: the anatomy is drawn in its own coordinates, the film sees them moved, turned, scaled and sheared.
    turn, zoom = rng.normal(0, 0.05), 0.84 * np.exp(rng.normal(0, 0.06))
    dx, dy, shear = rng.normal(0, 0.05), rng.normal(0.08, 0.06), rng.normal(0, 0.03)
    u, v = (px - dx) * zoom, (py - dy) * zoom
    x = np.cos(turn) * u - np.sin(turn) * v + shear * v
    y = np.sin(turn) * u + np.cos(turn) * v

    lung_w, lung_h = body.uniform(0.25, 0.31), body.uniform(0.50, 0.62)
    lung_x, lung_y = body.uniform(0.36, 0.42), body.uniform(-0.12, -0.02)
    base = lung_y + lung_h * body.uniform(0.62, 0.78)  # height of the diaphragm
    dome = body.uniform(0.06, 0.14)
    lungs, depth = [], []
    for side in (-1.0, 1.0):
        edge = _ellipse(x, y, side * lung_x, lung_y, lung_w, lung_h, 2.6)
        floor = y - (base - dome * (1.0 - ((x - side * lung_x) / lung_w) ** 2) - 0.03 * (side < 0))
        inside = np.maximum(edge, floor)
        lungs.append(inside)
        depth.append(floor)
    either = np.minimum(lungs[0], lungs[1])
    air = _soft(either, 0.018)

    # Attenuation: thorax, minus air, plus what lies in front of and behind the lungs.
    thorax = _soft(_ellipse(x, y, 0.0, 0.25, body.uniform(0.82, 0.95), 1.35, 3.5), 0.03)
    tissue = 1.0 + 0.10 * _clouds(rng, size, 3)
    film = thorax * tissue - body.uniform(0.50, 0.62) * air
    film += 0.24 * _soft(np.abs(x) - body.uniform(0.08, 0.12), 0.03) * thorax  # spine and mediastinum
    masks: dict[str, NDArray[np.bool_]] = {}
    has = {name: bool(rng.random() < prevalence) for name in PHANTOM_CLASSES}

    # Heart: its width against the chest is the finding, so its place, tilt and density vary freely.
    width = rng.uniform(0.335, 0.40) if has["Cardiomegaly"] else rng.uniform(0.20, 0.285)
    heart_x, heart_y = 0.09 + body.normal(0, 0.025), base - 0.16 + body.normal(0, 0.03)
    heart = _ellipse(x, y, heart_x, heart_y, width, body.uniform(0.20, 0.25), 2.2)
    film += body.uniform(0.30, 0.42) * _soft(heart, 0.02) * air
    if has["Cardiomegaly"]:
        masks["Cardiomegaly"] = heart < 0.0

    # Bones: ribs are arcs with the patient's own spacing and strength; clavicles cross the apices.
    phase = 2 * np.pi * ((y + body.uniform(0.25, 0.5) * np.abs(x) ** 1.6) / body.uniform(0.17, 0.22) + body.random())
    film += body.uniform(0.04, 0.09) * np.maximum(np.sin(phase), 0.0) ** 2 * thorax * (np.abs(x) > 0.12)
    for side in (-1.0, 1.0):
        line = y - (lung_y - lung_h * 0.72 + 0.25 * (side * x - 0.35) * body.uniform(-1, 1))
        film += 0.12 * _soft(np.abs(line) - 0.018, 0.008) * _soft(0.08 - side * x, 0.02) * thorax

    # Vessels fade from the hila outwards; where the lung has collapsed there are none.
    hilum = np.exp(-(((np.abs(x) - 0.17) / 0.22) ** 2) - ((y - lung_y) / 0.4) ** 2)
    vessels = (0.03 + 0.06 * hilum) * np.maximum(_clouds(rng, size, 12, 2), 0.0)
    film += vessels * air

    which = int(rng.integers(2))
    side = (-1.0, 1.0)[which]
    if has["Pneumothorax"]:
        # The lung falls away from the chest wall: a darker rim without vessels, bounded by a thin bright line.
        gap, top = rng.uniform(0.09, 0.14), rng.uniform(0.0, 0.35)
        rim = lungs[which] + gap + 0.3 * np.maximum(y - lung_y - top, 0.0)
        outer = side * (x - side * lung_x) + 0.5 * np.maximum(lung_y - y, 0.0) > -0.06
        free = _soft(-rim, 0.006) * air * outer
        film -= (vessels + 0.13) * free
        film += 0.16 * np.exp(-((rim / 0.016) ** 2)) * air * outer
        masks["Pneumothorax"] = (rim > 0) & (lungs[which] < 0) & outer
    which = int(rng.integers(2))
    side = (-1.0, 1.0)[which]
    if has["Effusion"]:
        # Fluid settles on the diaphragm and climbs the chest wall (the meniscus).
        level = rng.uniform(0.10, 0.22)
        climb = 0.22 * np.clip((side * x - lung_x) / lung_w + 0.3, 0.0, 1.3) ** 2
        fluid = np.maximum(-(depth[which] + level + climb), lungs[which])
        film += rng.uniform(0.30, 0.45) * _soft(fluid, 0.02) * air
        masks["Effusion"] = fluid < 0.0

    def spot(margin: float) -> tuple[float, float]:
        """A random place inside a lung, at least ``margin`` from its edge, not behind heart or diaphragm."""
        free = (either < -margin) & (heart > margin)
        rows, cols = np.nonzero(free if free.any() else either < -0.04)
        i = int(rng.integers(len(rows)))
        return float(x[rows[i], cols[i]]), float(y[rows[i], cols[i]])

    if has["Consolidation"]:
        cx, cy = spot(0.08)
        cloud = _ellipse(x, y, cx, cy, rng.uniform(0.20, 0.28), rng.uniform(0.20, 0.30))
        cloud = cloud + 0.06 * _clouds(rng, size, 6)
        patch = _soft(cloud, 0.035) * air
        film += rng.uniform(0.28, 0.38) * patch * np.clip(0.8 + 0.5 * _clouds(rng, size, 20, 1), 0, 2)
        masks["Consolidation"] = (cloud < 0) & (either < 0)
    for name, low, high, contrast in (("Mass", 0.16, 0.21, 0.46), ("Nodule", 0.07, 0.095, 0.50)):
        if has[name]:
            radius = rng.uniform(low, high)
            cx, cy = spot(radius * 0.8)
            ball = _ellipse(x, y, cx, cy, radius, radius * rng.uniform(0.85, 1.15)) + 0.008 * _clouds(rng, size, 8)
            # A sphere's shadow is brightest in its middle, unlike the flat patch of a consolidation.
            dome_shape = np.sqrt(np.clip(1 - (ball / radius + 1) ** 2, 0.3, 1))
            film += contrast * rng.uniform(0.85, 1.15) * _soft(ball, 0.012) * dome_shape
            masks[name] = ball < 0.0

    # Things that are no finding: cables, and a marker in a corner.
    for _ in range(int(rng.integers(3))):
        a, b, c = rng.uniform(-0.8, 0.8, 3)
        film += 0.25 * np.exp(-(((px - a - b * py - 0.3 * c * np.sin(2.5 * py)) / 0.012) ** 2))
    mx, my = rng.uniform(0.7, 0.9) * rng.choice([-1, 1]), rng.uniform(-0.95, -0.7)
    film += 0.6 * ((np.abs(px - mx) < 0.04) & (np.abs(py - my) < 0.05))

    # Exposure: tone curve, gain, a gradient across the plate, and quantum noise.
    low, high = np.percentile(film, (1, 99))
    grey = np.clip((film - low) / (high - low), 0.0, 1.2) ** np.exp(rng.normal(0, 0.25))
    gain, fog = rng.uniform(0.65, 1.0), rng.uniform(-0.03, 0.15)
    grey = gain * grey + fog + rng.normal(0, 0.04) * px + rng.normal(0, 0.04) * py
    grey = grey + rng.uniform(0.01, 0.03) * rng.standard_normal(grey.shape)
    image = np.round(255 * np.clip(grey, 0.0, 1.0)).astype(np.uint8)
    return Phantom(image, {name: mask for name, mask in masks.items() if mask.any()})
