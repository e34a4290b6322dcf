"""
Convolutions of small maps by minimal filtering: the same values from 2.25 or 4 times fewer multiplications.

Winograd's algorithms as in section 4 of Lavin and Gray, arXiv 1509.09308: tiles of `m x m` outputs are made of
`(m + 2)^2` products by channel, and not of `9 m^2`. On maps this small what they do to a whole map (cut it, pad it,
evaluate it) is one small matrix, and so is the way back: a convolution is three products of matrices. cuDNN does the
like on a GPU by itself; oneDNN does not on a processor.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Larger maps, and fewer channels, are convolved as fast as they are.
LARGEST_MAP, LEAST_CHANNELS = 8, 192
# For fewer maps reading the kernels, larger than the weights, takes as long as they save; with those of larger tiles it
# is so up to the second number, for maps of up to four pixels.
LEAST_MAPS, MANY_MAPS = 8, 48
# Where polynomials are evaluated, infinity apart: in reach of 1, which rounds less than integers do.
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


class Filtering(NamedTuple):
    """The matrices for maps of one size, with so many products by channel and tile."""

    into: Tensor  # [products * tiles, height * width], of the images
    kernel: Tensor  # [products, 9], of the weights
    back: Tensor  # [products * tiles, height * width], to the outputs


def suits(convolution: nn.Conv2d, size: torch.Size) -> bool:
    """Whether this is a convolution of 3x3, of many channels, that keeps the size `[height, width]` of a small map."""
    settings = (convolution.kernel_size, convolution.stride, convolution.dilation, convolution.padding)
    alike = settings == ((3, 3), (1, 1), (1, 1), (1, 1)) and convolution.padding_mode == "zeros"
    outputs, inputs, *kernel = convolution.weight.shape
    many = min(inputs, outputs) >= LEAST_CHANNELS and kernel == [3, 3] and convolution.groups == 1
    return alike and many and min(size) > 1 and max(size) <= LARGEST_MAP


def minimal_filtering(weight: Tensor, bias: Tensor | None, size: torch.Size, count: int) -> Callable[[Tensor], Tensor]:
    """
    The convolution with that weight, which may not change meanwhile, as a function of one or more maps of that size.

    In float32 it rounds as finely as a direct convolution where tiles are of two pixels a side, and some ten times more
    coarsely where they are of four: for maps of seven or eight pixels, and for many of three or four.

    Args:
        weight (`Tensor` of shape `[out, in, 3, 3]`): without a gradient.
        bias (`Tensor` of shape `[out]`, *optional*): added to each pixel.
        size (`torch.Size`): height and width of the maps.
        count (`int`): about how many maps there will be at once.

    Returns:
        `Callable`: from maps `[N, in, height, width]` to `[N, out, height, width]`.
    """
    with torch.inference_mode(False), torch.no_grad():
        filtering = _filtering(*size, 4 if _in_large_tiles(size, count) else 2, weight.dtype)
        outputs, inputs = weight.shape[:2]
        kernels = (filtering.kernel @ weight.reshape(-1, 9).T).view(-1, outputs, inputs).transpose(1, 2)

    def convolve(maps: Tensor) -> Tensor:
        # A view made in here: one that a Function returns may not be changed in place.
        result = _Filtered.apply(maps, filtering.into, kernels, filtering.back).view(len(maps), outputs, *size)
        result = result if bias is None else result + bias[:, None, None]
        # As a convolution would lay it out: what comes next may count on it.
        return result if maps.stride(1) > 1 else result.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    return convolve


class _Filtered(torch.autograd.Function):
    """
    From maps `[N, in, height, width]` to `[N * out, height * width]`.

    Its gradient is one more: of the transposed kernels, from the outputs to the images.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, into: Tensor, kernels: Tensor, back: Tensor) -> Tensor:
        inputs, outputs = kernels.shape[1:]
        columns = maps.reshape(-1, into.shape[1]).T
        products = torch.bmm((into @ columns).view(len(kernels), -1, inputs), kernels)
        return products.view(-1, len(maps) * outputs).T @ back

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None, None]:
        into, kernels, back = ctx.saved_tensors
        count, inputs, *size = ctx.shape
        with torch.autocast("cpu", enabled=False):
            given = above[0].reshape(count, -1, *size)
            below = _Filtered.apply(given, back, kernels.transpose(1, 2), into).view(count, inputs, *size)
        return below, None, None, None


def _in_large_tiles(size: torch.Size, count: int) -> bool:
    # Up to two pixels, and for five and six, they take as many products or more.
    return max(size) > 6 or (2 < max(size) <= 4 and count >= MANY_MAPS)


@functools.cache
def _filtering(height: int, width: int, tile: int, dtype: torch.dtype) -> Filtering:
    rows, columns = _along(tile, height), _along(tile, width)
    # Both directions at once; products first, then tiles, then pixels.
    into, back = (torch.einsum("pty,qsx->pqtsyx", *pair) for pair in zip(rows[::2], columns[::2], strict=True))
    kernel = torch.einsum("pi,qj->pqij", rows[1], columns[1]).reshape(-1, 9)
    into, back = (matrix.reshape(-1, height * width) for matrix in (into, back))
    return Filtering(*(matrix.to(dtype) for matrix in (into, kernel, back)))


def _along(tile: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """In one direction: `[products, tiles, pixels]` of images, `[products, 3]` of weights, then that of outputs."""
    taps, tiles = tile + 2, -(-length // tile)
    kind: dict[str, Any] = {
        "dtype": torch.float64,
        "device": "cpu",
    }  # whatever the defaults are: what is made here is kept
    points = torch.tensor(POINTS[tile], **kind)

    def evaluated(coefficients: int) -> Tensor:
        """Polynomials of that many coefficients at every point."""
        at_infinity = torch.eye(coefficients, **kind)[-1:]
        return torch.cat([torch.linalg.vander(points, N=coefficients), at_infinity])

    of_image, of_output = torch.linalg.inv(evaluated(taps)).T, evaluated(tile)
    padded, back = torch.zeros(taps, tiles, tiles * tile + 2, **kind), torch.zeros(taps, tiles, tiles * tile, **kind)
    for number in range(tiles):
        start = number * tile
        padded[:, number, start : start + taps] = of_image
        back[:, number, start : start + tile] = of_output
    # What is padded is 0, and what is beyond the map is nobody's output.
    return padded[:, :, 1 : length + 1], evaluated(3), back[:, :, :length]
