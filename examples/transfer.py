"""Colour transfer: a picture gets the colours of another one, by the barycentric map of an optimal-transport plan.

Every pixel of the source is a row of the plan, a sample of the target's pixels are its columns, and the cost is the
squared distance of their colours. A source pixel becomes the mean of the colours that its mass goes to. The same lines
carry features from one domain to another: take features in place of colours.

    python -m examples.transfer --help

Source: Ferradans et al. 2014, Regularized Discrete Optimal Transport (arXiv 1307.5551).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import otloss


def transfer(source: Tensor, target: Tensor, eps: float = 0.005, sample: int = 400) -> Tensor:
    """The pixels ``(n, 3)`` of a source with the colours of the pixels ``(m, 3)`` of a target, all in [0, 1]."""
    colours = target[torch.randperm(len(target))[:sample]]
    out = otloss.sinkhorn(otloss.sqeuclidean_cost(source, colours), eps=eps)
    print(out.summary())
    return otloss.barycentric(out, colours)


def made_up(size: int) -> tuple[Tensor, Tensor]:
    """Two pictures ``(size, size, 3)``: hills at noon, and the colours of an evening."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    hill = (y > 0.6 + 0.15 * (6 * x).sin()).unsqueeze(-1)
    sky = torch.stack((0.4 + 0.3 * y, 0.6 + 0.3 * y, 0.9 + 0 * y), -1)
    grass = torch.stack((0.2 + 0.2 * x, 0.6 - 0.3 * (y - 0.6), 0.2 + 0 * x), -1)
    dusk = torch.stack((0.9 - 0.3 * y, 0.4 - 0.2 * y + 0.2 * x, 0.3 + 0.2 * y), -1)
    sea = torch.stack((0.15 + 0.1 * x, 0.1 + 0 * x, 0.3 + 0.1 * (1 - y)), -1)
    noon, evening = torch.where(hill, grass, sky), torch.where((y > 0.6).unsqueeze(-1), sea, dusk)
    return tuple((view + 0.02 * torch.randn_like(view)).clamp(0, 1) for view in (noon, evening))  # type: ignore[return-value]


def read(path: Path, size: int) -> Tensor:
    """A picture ``(h, w, 3)`` in [0, 1], at most ``size`` pixels wide and high."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((size, size))
        return torch.from_numpy(np.asarray(image).copy()).float() / 255


def write(path: Path, pictures: list[Tensor]) -> None:
    """Write pictures beside each other."""
    from PIL import Image

    height, width = max(len(p) for p in pictures), sum(p.shape[1] for p in pictures)
    sheet, left = torch.ones(height, width, 3), 0
    for picture in pictures:
        sheet[: len(picture), left : left + picture.shape[1]] = picture
        left += picture.shape[1]
    Image.fromarray((255 * sheet.clamp(0, 1)).round().byte().numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> Tensor:
    """Write source, target and result beside each other, and return the result ``(h, w, 3)``."""
    parser = argparse.ArgumentParser(description="Give a picture the colours of another one. Needs Pillow.")
    parser.add_argument("--source", type=Path, help="a picture; drawn if not given")
    parser.add_argument("--target", type=Path, help="the picture with the colours; drawn if not given")
    parser.add_argument("--size", type=int, default=96, help="pictures are made this small (%(default)s)")
    parser.add_argument("--sample", type=int, default=400, help="pixels of the target that are used (%(default)s)")
    parser.add_argument("--eps", type=float, default=0.005, help="strength of the entropy (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("transfer.png"), help="the file to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    source, target = made_up(options.size)
    source = source if options.source is None else read(options.source, options.size)
    target = target if options.target is None else read(options.target, options.size)
    moved = transfer(source.flatten(0, 1), target.flatten(0, 1), options.eps, options.sample)
    result = moved.reshape(source.shape)
    write(options.out, [source, target, result])
    print(f"source, target and result: {options.out}")
    return result


if __name__ == "__main__":
    main()
