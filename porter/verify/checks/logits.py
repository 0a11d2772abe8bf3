"""The next-token distribution at every position, both models given the same tokens."""

import torch

from porter.verify.result import Check
from porter.verify.subject import Subject

NAME = "logits"


def check(subject: Subject) -> Check:
    """PASS if the divergence is within the limit and the best token is the original's outside ties."""
    ours, theirs = subject.port_run.logits.double(), subject.reference_run.logits.double()
    if ours.shape != theirs.shape:
        return Check(
            NAME, "FAIL", f"{list(ours.shape)}", f"{list(theirs.shape)}", "the port's logits have another shape"
        )
    ours_log, theirs_log = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = float((theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean())
    wrong = wrong_tokens(ours.argmax(-1), theirs, tie_margin(subject))
    limit = subject.tolerance.kl
    passed = not wrong and (limit is None or divergence <= limit)
    shift = float((ours_log - theirs_log).abs().max())
    figure = f"KL {abs(divergence):.1e}, top-1 {1 - len(wrong) / len(ours):.0%}"
    detail = (
        f"best token differs at {len(wrong)} of {len(ours)} positions" if wrong else f"largest shift {shift:.1e} nats"
    )
    data = {"worst": abs(divergence), "kl": divergence, "wrong": wrong, "max_logprob_shift": shift}
    return Check(NAME, "PASS" if passed else "FAIL", figure, "-" if limit is None else f"{limit:g}", detail, data)


def tie_margin(subject: Subject) -> float:
    """How close the original's two best logits may be for either token to count as right."""
    if not subject.half:
        return subject.tolerance.margin
    rounding = (subject.rounded_run.logits - subject.reference_run.logits).abs().max()
    return subject.tolerance.margin + 2 * float(rounding)


def wrong_tokens(tokens: torch.Tensor, logits: torch.Tensor, margin: float) -> list[int]:
    """Rows where `tokens` `[n]` is further than `margin` below the best of `logits` `[n, vocab]`."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    short = logits.max(-1).values - chosen
    return [int(row) for row in torch.nonzero(~(short <= margin))]
