"""The next-token distribution at every position, both models given the same tokens."""

import torch

from porter.verify.result import Check
from porter.verify.signatures import Evidence, explain
from porter.verify.subject import Subject

NAME = "logits"
_SENT_ELSEWHERE = 0.05  # of the tokens, in half precision, if the original's own choices of experts depend on rounding


def check(subject: Subject) -> Check:
    """PASS if the divergence is within the limit and the best token is the original's outside ties."""
    ours, theirs = subject.port_logits.double(), subject.expected_logits.double()
    if ours.shape != theirs.shape:
        return Check(
            NAME, "FAIL", f"{list(ours.shape)}", f"{list(theirs.shape)}", "the port's logits have another shape"
        )
    ours_log, theirs_log = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = float((theirs_log.exp() * (theirs_log - ours_log)).sum(-1).mean())
    wrong = wrong_tokens(ours.argmax(-1), theirs, tie_margin(subject))
    limit = subject.tolerance.kl
    passed = tolerated(subject, len(wrong), len(ours)) and (limit is None or divergence <= limit)
    shift = float((ours_log - theirs_log).abs().max())
    figure = f"KL {abs(divergence):.1e}, top-1 {1 - len(wrong) / len(ours):.0%}"
    detail = f"largest shift {shift:.1e} nats"
    if not passed:
        told = f"best token differs at {len(wrong)} of {len(ours)} positions, " if wrong else ""
        detail = f"{told}{detail}; every module is right: compute_logits is not; look at: {_cause(subject)}"
    data = {"worst": abs(divergence), "kl": divergence, "wrong": wrong, "max_logprob_shift": shift, "culprit": ""}
    return Check(NAME, "PASS" if passed else "FAIL", figure, "-" if limit is None else f"{limit:g}", detail, data)


def tolerated(subject: Subject, wrong: int, total: int) -> bool:
    """Whether so many wrong tokens are fine: none, or a few where rounding decides which experts a token goes to."""
    return wrong <= (_SENT_ELSEWHERE * total if subject.chooses_otherwise else 0)


def _cause(subject: Subject) -> str:
    ours, theirs = subject.port_logits, subject.expected_logits
    found = Evidence("", ours, theirs, {}, subject.positions, 1e-3)
    return explain(found) or "the head (tied against the checkpoint?), a cap or a scale of the logits"


def tie_margin(subject: Subject) -> float:
    """How close the original's two best logits may be for either token to count as right."""
    if not subject.half:
        return subject.tolerance.margin
    return subject.tolerance.margin + 2 * subject.logit_rounding


def wrong_tokens(tokens: torch.Tensor, logits: torch.Tensor, margin: float) -> list[int]:
    """Rows where `tokens` `[n]` is further than `margin` below the best of `logits` `[n, vocab]`."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    short = logits.max(-1).values - chosen
    return [int(row) for row in torch.nonzero(~(short <= margin))]
