"""The contract of a captioner, checked once on a few copies of one image: logits of each word from the words before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mirror_modules._checks import as_checked, at_least_float32, autocast_dtype, is_readable, shape_of

# Words of a caption that are enough to find a shift.
SHORT = 6


def run_captioner(
    owner: str,
    captioner: nn.Module,
    images: Tensor,
    tokens: Tensor,
    word_mask: Tensor | None,
    options: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Call a captioner and require floating-point logits (B, L, V) for tokens (B, L).

    Raises:
        ValueError: The captioner returns something else.
    """
    logits = captioner(images, tokens, word_mask, **(options or {}))
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == tokens.shape:
        if logits.is_floating_point():
            return logits
        kind, hint = f"{logits.dtype}", "; return unnormalized log-probabilities as floats"
    else:
        kind = shape_of(logits) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        hint = "; return its `logits`" if hasattr(logits, "logits") else ""
        if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == tokens.shape[1] + 1:
            hint = (
                ", one position too many; if a start token stands before the tokens, the prediction after the last "
                "token is left: return logits[:, :-1]"
            )
    raise ValueError(
        f"{owner}: the captioner {type(captioner).__name__} must return logits (B, L, V) for tokens "
        f"{shape_of(tokens)}, but it returned {kind}{hint}."
    )


def probe_captioner(owner: str, captioner: nn.Module, images: Tensor, tokens: Tensor, word_mask: Tensor | None) -> None:
    """Require that a captioner keeps its contract.

    `logits[:, t]` depends on the image and on `tokens[:, :t]`, up to the last of them, but on no token from t on and on
    no padding. Logits are finite and no probabilities. If the images require a gradient, it reaches them.

    The captioner runs once, on copies of the first image with a few words of its caption, in which the words from some
    t on are replaced, and, where captions are padded on the left, with other padding.

    Raises:
        ValueError: The contract is broken; the message names the likely mistake.
    """
    probe = _Probe(tokens, word_mask)
    with_gradient = needs_gradient(images)
    with _without_side_effects(captioner, images.device), torch.set_grad_enabled(with_gradient):
        image = images[:1].detach().clone().requires_grad_(with_gradient)
        copies = image.repeat(probe.tokens.shape[0], 1, 1, 1)
        logits_NLV = run_captioner(owner, captioner, copies, probe.tokens, probe.word_mask)
        name = f"the captioner {type(captioner).__name__}"
        _check_values(owner, name, logits_NLV.detach(), probe)
        _check_dependence(owner, name, logits_NLV.detach(), probe, autocast_dtype(images))
        if with_gradient:
            _check_gradient(owner, name, logits_NLV, probe, image)


def needs_gradient(images: Tensor) -> bool:
    """Whether a call with these images is expected to give them a gradient."""
    return images.requires_grad and torch.is_grad_enabled() and not images.is_inference()


def can_probe(images: Tensor) -> bool:
    """Whether a captioner can be checked on these images; transforms of `torch.func` do not admit `requires_grad_`."""
    return is_readable(images) and not torch._C._functorch.is_functorch_wrapped_tensor(images)


class _Probe:
    """Rows of tokens: a short caption twice, then one copy for each start with the words from there on replaced.

    If the captions are padded on the left, all rows begin with padding, and the last two differ in nothing else.
    """

    def __init__(self, tokens: Tensor, word_mask: Tensor | None) -> None:
        caption = tokens[0] if word_mask is None else tokens[0][word_mask[0]]
        caption = caption[:SHORT]
        length, device = caption.shape[0], tokens.device
        self.starts = sorted({0, min(1, length - 1), length // 2})
        # Ids of this call, or one below: they lie within the vocabulary, whose size is not known yet.
        low, high = tokens.min(), tokens.max()
        low = torch.where(low == high, (high - 1).clamp(min=0), low)
        replaced = torch.where(caption == high, low, high)
        starts_K1 = torch.tensor(self.starts, device=device).unsqueeze(1)
        is_kept = torch.arange(length, device=device) < starts_K1
        # Two unchanged copies first: if they differ, the captioner is random.
        rows = torch.cat((caption.expand(2, -1), torch.where(is_kept, caption, replaced)))
        self.pads_left = word_mask is not None and not bool(word_mask[:, 0].all())
        self.offset = 0
        self.word_mask = None if word_mask is None else torch.ones_like(rows, dtype=torch.bool)
        if self.pads_left:
            self.offset = 1
            rows = torch.cat((rows, rows[:1], rows[:1]))
            padding = torch.full_like(rows[:, :1], int(low))
            padding[-1] = high
            rows = torch.cat((padding, rows), dim=1)
            self.word_mask = torch.ones_like(rows, dtype=torch.bool)
            self.word_mask[:, 0] = False
            self.word_mask = as_checked(self.word_mask)
        self.tokens = rows

    def at_words(self, values_NL: Tensor) -> Tensor:
        """The tokens or logits at the words, without those at padding."""
        return values_NL[:, self.offset :]


def _check_values(owner: str, name: str, logits_NLV: Tensor, probe: _Probe) -> None:
    logits_NLV = at_least_float32(probe.at_words(logits_NLV))
    words = probe.at_words(probe.tokens)
    if int(words.max()) >= logits_NLV.shape[2]:
        raise ValueError(
            f"{owner}: tokens range from {int(words.min())} to {int(words.max())} but vocabulary_size="
            f"{logits_NLV.shape[2]} in the logits of {name}; were they encoded with another vocabulary?"
        )
    # Logits of tokens that are never generated may be -inf.
    if bool((logits_NLV.isnan() | logits_NLV.isposinf()).any()):
        raise ValueError(
            f"{owner}: logits of {name} are NaN or infinite; check its weights, its precision and the range of the "
            "images. check=False skips this check."
        )
    if logits_NLV.shape[2] > 1 and bool((logits_NLV >= 0).all()):
        sums = logits_NLV.sum(dim=2)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise ValueError(
                f"{owner}: {name} returns probabilities; return logits, or the logarithms of the probabilities. "
                "check=False skips this check."
            )


def _check_dependence(owner: str, name: str, logits_NLV: Tensor, probe: _Probe, dtype: torch.dtype) -> None:
    # Rounding may differ between rows of a batch, by the precision of autocast or of the captioner itself.
    precision = max(torch.finfo(each).eps for each in (logits_NLV.dtype, dtype))
    logits_NLV = at_least_float32(probe.at_words(logits_NLV))
    difference_NL = (logits_NLV[1:] - logits_NLV[0]).nan_to_num(0.0).abs().amax(dim=2)
    scores_LV = logits_NLV[0].nan_to_num(0.0, 0.0, 0.0)
    spread = (scores_LV - scores_LV.mean(dim=1, keepdim=True)).abs().amax()
    tolerance = precision**0.5 * spread + 16 * precision * scores_LV.abs().amax() + 2 * difference_NL[0].amax()
    moves_KL = (difference_NL[1 : len(probe.starts) + 1] > tolerance).tolist()
    for start, moves in zip(probe.starts, moves_KL):
        if True in moves[:start]:
            raise ValueError(
                f"{owner}: logits[:, {moves.index(True)}] of {name} depends on tokens[:, {start}:]. It must be causal: "
                "logits[:, t] predicts tokens[:, t] from the image and tokens[:, :t] alone. check=False skips this "
                "check."
            )
    for start, moves in zip(probe.starts, moves_KL):
        if moves[start]:
            raise ValueError(
                f"{owner}: logits[:, {start}] of {name} depends on the token at the same position, which it must "
                "predict. If its logits predict the next token, as those of Hugging Face's models do, shift them by "
                "one: run it on a start token followed by the tokens, and return logits[:, :-1]. check=False skips "
                "this check."
            )
    if probe.pads_left:
        one, other = logits_NLV[-2:]
        if bool((one - other).nan_to_num(0.0).abs().amax() > tolerance):
            raise ValueError(
                f"{owner}: the captions are padded on the left, and the padding changes the logits of {name}; pass "
                "word_mask on to its attention, or pad on the right, such as with tokenizer.padding_side = 'right'. "
                "check=False skips this check."
            )
    first, noise = difference_NL[1], 2 * difference_NL[0].amax() + precision * scores_LV.abs().amax()
    if len(first) > 2 and bool((first[1] <= noise) & (first[2:].amax() > torch.maximum(tolerance, 16 * noise))):
        raise ValueError(
            f"{owner}: logits[:, 1] of {name} does not depend on tokens[:, 0], but later logits do: they are shifted "
            "by one position too many. logits[:, t] predicts tokens[:, t] from the image and tokens[:, :t]; if a start "
            "token stands before the tokens, return logits[:, :-1]. check=False skips this check."
        )


def _check_gradient(owner: str, name: str, logits_NLV: Tensor, probe: _Probe, image: Tensor) -> None:
    gradient = None
    if logits_NLV.requires_grad:
        log_p_LV = at_least_float32(probe.at_words(logits_NLV)[0]).log_softmax(dim=1)
        log_p = log_p_LV.gather(1, probe.at_words(probe.tokens)[0].long().unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(log_p, image, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"{owner}: the images require a gradient, but none passes through {name}: it runs under torch.no_grad, or "
            "uses images.detach(), images.data or a NumPy array. check=False skips this check."
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError(
            f"{owner}: the gradient that {name} gives the image is not finite; check its precision. check=False skips "
            "this check."
        )
    if not bool(gradient.any()):
        raise ValueError(
            f"{owner}: the images require a gradient, but that of {name} is zero at every pixel: rounding or a "
            "conversion to uint8 removes it, or the captioner ignores the image. check=False skips this check."
        )


@contextmanager
def _without_side_effects(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers and random states on exit."""
    buffers = [
        (owner._buffers, name, buffer, None if buffer.is_inference() else buffer._version, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for owner, name, buffer, version, value in buffers:
            # Writing to a buffer that did not change would break the backward pass of earlier calls that saved it.
            if version is None or buffer._version != version:
                buffer.copy_(value)
            owner[name] = buffer
