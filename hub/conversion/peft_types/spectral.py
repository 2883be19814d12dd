"""Adapters with few coefficients of a large change: FourierFT, C3A and SHiRA."""

from __future__ import annotations

import torch
from experthub.hub.conversion.peft_types.adapter_type import AdaptedModule, AdapterType, register
from experthub.merge import Dense


def _fourierft(module: AdaptedModule) -> Dense:
    """Return the real part of the inverse Fourier transform of a few drawn frequencies."""
    outputs, inputs = module.base.shape(module.path)
    spectrum = module.tensors["fourierft_spectrum"]
    generator = torch.Generator().manual_seed(module.setting("random_loc_seed", 777))
    places = torch.randperm(outputs * inputs, generator=generator)[: len(spectrum)]
    dense = torch.zeros(outputs * inputs, dtype=spectrum.dtype)
    dense[places] = spectrum
    scale = module.setting("scaling", 150.0)
    return Dense(torch.fft.ifft2(dense.view(outputs, inputs)).real * scale)


register(
    AdapterType(
        "FOURIERFT",
        ("fourierft_spectrum",),
        _fourierft,
        frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"}),
        needs_base=True,
    )
)


def _c3a(module: AdaptedModule) -> Dense:
    """Return blocks of circulant matrices, each made of one row, over the number of inputs."""
    kernel = module.tensors["c3a_kernel"]
    rows, columns, size = kernel.shape
    places = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size
    blocks = kernel[:, :, places]
    whole = blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size)
    return Dense(whole / (columns * size))


register(
    AdapterType(
        "C3A",
        ("c3a_kernel",),
        _c3a,
        frozenset({"block_size", "block_size_pattern"}),
        needs_base=True,
    )
)


def _shira(module: AdaptedModule) -> Dense:
    """Return a matrix that is zero except at the stored places."""
    outputs, inputs = module.base.shape(module.path)
    rows, columns = module.tensors["shira_indices"].long()
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    dense[rows, columns] = module.tensors["shira_weight"]
    return Dense(dense)


register(
    AdapterType(
        "SHIRA",
        ("shira_weight", "shira_indices"),
        _shira,
        frozenset({"r", "mask_type", "random_seed"}),
        needs_base=True,
    )
)
