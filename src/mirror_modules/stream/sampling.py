"""Sampling latents of a generator whose images a captioner finds likely (PPGN, Nguyen et al., CVPR 2017)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mirror_modules._checks import (
    check_features,
    check_generator,
    check_number,
    check_positive,
    check_precision,
    check_sizes,
    check_tensors,
    shape_of,
)
from mirror_modules._typing import TypedCall


class LatentSamples(NamedTuple):
    """Latents at the end of sampling, and the likelihoods on the way."""

    latents: Tensor
    """(B, ...)"""
    log_likelihood: Tensor
    """Before the first step and after each, (steps + 1, B)."""


def gaussian_prior(latents: Tensor, noise_level: float = 1.0) -> Tensor:
    """Denoise latents that are standard normal before noise is added: the optimal denoiser, in closed form.

        R(h) = E[z | z + s e = h] = h / (1 + s^2)        z, e ~ N(0, I)

    R(h) - h is s^2 times the gradient of the log density of h, for any distribution of z. Where that is not normal,
    train a `DenoisingAutoencoder`.

    Args:
        latents: Of any shape.
        noise_level: Standard deviation s of the noise.

    Returns:
        Denoised latents.

    Raises:
        ValueError: `latents` are not floating point, or `noise_level` is not a positive number.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import gaussian_prior
        >>> gaussian_prior(torch.tensor([[2.0, -4.0]]))
        tensor([[ 1., -2.]])
    """
    check_tensors("gaussian_prior", latents=latents)
    check_number("gaussian_prior", noise_level=noise_level)
    if noise_level <= 0 or not latents.is_floating_point():
        raise ValueError(
            f"gaussian_prior: latents must be floating point and noise_level positive, but they are {latents.dtype} "
            f"and {noise_level!r}."
        )
    return latents / (1 + noise_level**2)


def latent_step(
    latents: Tensor,
    denoised: Tensor,
    gradient: Tensor,
    noise: Tensor | None = None,
    *,
    prior_weight: float,
    condition_weight: float,
    noise_weight: float = 0.0,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """Move latents towards the prior and towards the condition (PPGN, Eq. 11).

        d = prior_weight * (R(h) - h) + condition_weight * g + noise_weight * e
        h <- h + d

    `g` is the gradient of the log likelihood of the condition. With a step size s, as in the published code, the length
    of the step is fixed for each sample, and only the ratios of the weights matter:

        h <- clip(h + s * d / mean |d|, bounds)

    Args:
        latents: h, (B, ...).
        denoised: R(h).
        gradient: g, of the sum over the batch: a mean would divide it by B.
        noise: Standard normal e; None for none.
        prior_weight: Called epsilon 1 in the paper.
        condition_weight: Epsilon 2.
        noise_weight: Epsilon 3.
        step_size: s; None adds d as it is.
        bounds: The smallest and the largest latent; None for no bounds.

    Returns:
        New latents, (B, ...).

    Raises:
        ValueError: Shapes disagree, a weight or the step size is not a finite number, or bounds are not in order.

    Examples:
        >>> import torch
        >>> from mirror_modules.functional import gaussian_prior, latent_step
        >>> latents, gradient = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> latent_step(latents, gaussian_prior(latents), gradient, prior_weight=1.0, condition_weight=1.0)
        tensor([[1., 3.]])
        >>> weights = {"prior_weight": 1.0, "condition_weight": 1.0}
        >>> latent_step(latents, gaussian_prior(latents), gradient, **weights, step_size=0.1)  # d / 2 * 0.1
        tensor([[1.9500, 0.1500]])
    """
    owner = "latent_step"
    check_tensors(owner, latents=latents)
    if latents.ndim < 2:
        raise ValueError(f"{owner}: latents must be (B, ...) with at least two axes, but they are {shape_of(latents)}.")
    given = {"denoised": denoised, "gradient": gradient} | ({} if noise is None else {"noise": noise})
    check_tensors(owner, **given)
    for name, tensor in given.items():
        if tensor.shape != latents.shape:
            raise ValueError(
                f"{owner}: {name} must have the shape of latents {shape_of(latents)}, but it is {shape_of(tensor)}."
            )
    weights = {"prior_weight": prior_weight, "condition_weight": condition_weight, "noise_weight": noise_weight}
    check_number(owner, **weights, **({} if step_size is None else {"step_size": step_size}))
    _check_bounds(owner, bounds)
    direction = prior_weight * (denoised - latents) + condition_weight * gradient
    if noise is not None:
        direction = direction + noise_weight * noise
    if step_size is not None:
        # One norm per sample: a sample does not depend on the others of the batch.
        length = direction.abs().mean(dim=tuple(range(1, direction.ndim)), keepdim=True)
        direction = step_size * direction / length.clamp(min=torch.finfo(direction.dtype).tiny)
    moved = latents + direction
    return moved if bounds is None else moved.clamp(*bounds)


def _check_bounds(owner: str, bounds: tuple[float, float] | None) -> None:
    """Require a smallest and a largest latent, which may be infinite."""
    if bounds is None:
        return
    is_pair = (
        isinstance(bounds, Sequence) and len(bounds) == 2 and all(isinstance(each, int | float) for each in bounds)
    )
    if not is_pair or not bounds[0] < bounds[1]:
        raise ValueError(f"{owner}: bounds must be (smallest, largest), but they are {bounds!r}.")


class LatentSampler:
    """Move latents to images that fit a caption, by gradient ascent (PPGN, Nguyen et al., CVPR 2017, Sec. 3.3).

        h <- h + e1 (R(h) - h) + e2 d log p(caption | G(h)) / dh + N(0, e3^2)

    G is any generator and p any differentiable score of its images, so that one captioner, which was trained once,
    conditions generators that have never seen text. The step is that of `latent_step`.

        sampler = LatentSampler(generator, RedescriptionScore(captioner))
        samples = sampler(torch.randn(4, 100), ["a small red flower"] * 4)
        images = generator(samples.latents)

    Generator, score and denoiser shall treat each sample alone, as batch norm does in evaluation mode only. Their
    parameters receive no gradient.

    Args:
        make: Generator, `make(latents) -> images`. For latents in several parts, such as noise and condition, split the
            latents there.
        score: Log likelihood, `score(images, *condition) -> (B,)`, such as a `RedescriptionScore`.
        denoiser: R, `denoiser(latents) -> latents`: `gaussian_prior`, a `DenoisingAutoencoder`, or generator and
            encoder one after the other, as in PPGN.
        prior_weight: e1. Defaults are those of the published code for captions.
        condition_weight: e2.
        noise_weight: e3.
        steps: Number of updates.
        step_sizes: Step size of the first and of the last update, linear in between; None for the plain equation.
        bounds: The smallest and the largest latent, (0, 30) in the published code, whose latents are features after a
            ReLU; None for no bounds.

    Raises:
        ValueError: A weight is negative, or an option is not a number of its range.

    Examples:
        >>> import torch
        >>> from mirror_modules import LatentSampler
        >>> def log_likelihood(images, target):  # of images that have two pixels
        ...     return -(images - target).square().sum(dim=1)
        >>> sampler = LatentSampler(torch.tanh, log_likelihood, steps=50, step_sizes=(0.1, 0.001))
        >>> samples = sampler(torch.zeros(3, 2), torch.tensor([0.5, -0.5]))
        >>> torch.tanh(samples.latents[0]).round(decimals=1).tolist()
        [0.5, -0.5]
        >>> bool((samples.log_likelihood[-1] > samples.log_likelihood[0]).all())
        True
    """

    def __init__(
        self,
        make: Callable[[Tensor], Tensor],
        score: Callable[..., Tensor],
        *,
        denoiser: Callable[[Tensor], Tensor] = gaussian_prior,
        prior_weight: float = 1e-3,
        condition_weight: float = 1.0,
        noise_weight: float = 0.0,
        steps: int = 201,
        step_sizes: tuple[float, float] | None = (1.0, 1e-10),
        bounds: tuple[float, float] | None = None,
    ) -> None:
        owner = "LatentSampler"
        check_positive(owner, steps=steps)
        weights = {"prior_weight": prior_weight, "condition_weight": condition_weight, "noise_weight": noise_weight}
        check_number(owner, **weights)
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{owner}: {name} must be at least 0, but it is {weight!r}.")
        if step_sizes is not None:
            if not isinstance(step_sizes, Sequence) or len(step_sizes) != 2:
                raise ValueError(f"{owner}: step_sizes must be (first, last), but they are {step_sizes!r}.")
            check_number(owner, **{f"step_sizes[{i}]": size for i, size in enumerate(step_sizes)})
            if min(step_sizes) < 0:
                raise ValueError(f"{owner}: step_sizes must be at least 0, but they are {step_sizes}.")
        _check_bounds(owner, bounds)
        self.make, self.score, self.denoiser = make, score, denoiser
        self.prior_weight, self.condition_weight, self.noise_weight = prior_weight, condition_weight, noise_weight
        self.steps, self.step_sizes, self.bounds = steps, step_sizes, bounds

    def __call__(
        self,
        latents: Tensor,
        *condition: Any,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LatentSamples:
        """Sample.

        Args:
            latents: The start, such as standard normal noise, (B, ...).
            *condition: What the score takes after the images, such as captions.
            noise: Standard normal noise of the updates, (steps, B, ...); None samples it, if it has a weight.
            generator: Source of the noise; None uses torch's global generator.

        Returns:
            The latents after the last update, and the log likelihoods on the way.

        Raises:
            ValueError: Shapes disagree, or the score does not return one value per sample that depends on the latents.
        """
        owner = "LatentSampler"
        check_tensors(owner, latents=latents)
        if latents.ndim < 2 or not latents.is_floating_point():
            raise ValueError(
                f"{owner}: latents must be floats (B, ...), but they are {latents.dtype} {shape_of(latents)}."
            )
        if noise is not None:
            check_tensors(owner, noise=noise)
            if noise.shape != (self.steps, *latents.shape):
                expected = (self.steps, *latents.shape)
                raise ValueError(f"{owner}: noise must be {expected}, (steps, B, ...), but it is {shape_of(noise)}.")
        check_generator(owner, generator)
        likelihoods = []
        # The loop needs gradients whatever the mode of the caller, and tensors that are not of inference mode.
        with torch.inference_mode(False):
            latents = latents.detach().clone()
            for i in range(self.steps):
                log_likelihood, gradient = self._likelihood(latents, condition)
                likelihoods.append(log_likelihood)
                with torch.no_grad():
                    drawn = None if noise is None else noise[i]
                    if drawn is None and self.noise_weight > 0:
                        drawn = torch.randn(
                            latents.shape, generator=generator, dtype=latents.dtype, device=latents.device
                        )
                    latents = latent_step(
                        latents,
                        self.denoiser(latents),
                        gradient,
                        drawn,
                        prior_weight=self.prior_weight,
                        condition_weight=self.condition_weight,
                        noise_weight=self.noise_weight,
                        step_size=self._step_size(i),
                        bounds=self.bounds,
                    )
            with torch.no_grad():
                likelihoods.append(self.score(self.make(latents), *condition))
        return LatentSamples(latents, torch.stack(likelihoods))

    def _likelihood(self, latents: Tensor, condition: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The log likelihood of each sample, (B,), and its gradient, (B, ...)."""
        with torch.enable_grad():
            latents = latents.detach().requires_grad_()
            log_likelihood = self.score(self.make(latents), *condition)
            if log_likelihood.shape != latents.shape[:1]:
                raise ValueError(
                    f"LatentSampler: score must return one value per sample ({latents.shape[0]},), but it returned "
                    f"{shape_of(log_likelihood)}."
                )
            gradient = None
            if log_likelihood.requires_grad:
                (gradient,) = torch.autograd.grad(log_likelihood.sum(), latents, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    "LatentSampler: the score does not depend on the latents; make and score must not run in no_grad, "
                    "nor detach or round images."
                )
        return log_likelihood.detach(), gradient

    def _step_size(self, i: int) -> float | None:
        if self.step_sizes is None:
            return None
        first, last = self.step_sizes
        return first + (last - first) * i / max(self.steps - 1, 1)


class DenoisingAutoencoder(TypedCall, nn.Module):
    """Learn the distribution of latents by removing noise from them (PPGN-h, Nguyen et al., CVPR 2017, Sec. 3.3).

        R(h) = MLP(h),    trained to minimize E |R(h + s e) - h|^2        e ~ N(0, I)

    R(h) - h is then about s^2 times the gradient of the log density of the latents: the prior of a `LatentSampler`. For
    latents that are standard normal by construction, `gaussian_prior` is exact.

    Args:
        latent_dim: Size D of a latent.
        hidden_dims: Sizes of the hidden layers, each with a ReLU.

    Raises:
        ValueError: A size is not a whole number of at least 1.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from mirror_modules import DenoisingAutoencoder
        >>> autoencoder, latents = DenoisingAutoencoder(latent_dim=20, hidden_dims=(32, 32)), torch.rand(8, 20)
        >>> F.mse_loss(autoencoder(latents + 0.1 * torch.randn(8, 20)), latents).backward()  # a training step
        >>> autoencoder(latents).shape
        torch.Size([8, 20])
    """

    def __init__(self, latent_dim: int, hidden_dims: Sequence[int] = (2048, 1024, 500, 1024, 2048)) -> None:
        super().__init__()
        check_positive("DenoisingAutoencoder", latent_dim=latent_dim)
        check_sizes("DenoisingAutoencoder", hidden_dims=hidden_dims)
        self.latent_dim = latent_dim
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((latent_dim, *hidden_dims, latent_dim)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latents: Tensor) -> Tensor:
        """Denoise latents.

        Args:
            latents: (B, D).

        Returns:
            Denoised latents, (B, D).

        Raises:
            ValueError: `latents` are not (B, D).
        """
        check_features("DenoisingAutoencoder", "latents", latents, "(B, D)", self.latent_dim, "latent_dim")
        check_precision("DenoisingAutoencoder", self.layers, latents=latents)
        return self.layers(latents)
