"""The kinds of refusal, by a code that stays the same from release to release: `porter explain P200`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefusalKind:
    """Why a class of constructs can't become part of a port, and what a person can do about it."""

    code: str
    title: str
    why: str
    remedy: str


KINDS = {
    kind.code: kind
    for kind in (
        RefusalKind(
            "P100",
            "a construct that is not understood",
            "porter executes the file symbolically, over tensors whose sizes are formulas of the config. What it can't "
            "follow it can't prove to be harmless, so it neither keeps nor drops it.",
            "rewrite the line in plain torch, or take it out if inference does not need it",
        ),
        RefusalKind(
            "P101",
            "control flow that depends on data",
            "a branch or a loop is decided by the values in a tensor. A batch of the engine mixes sequences, so one "
            "decision for all of them would be wrong for some.",
            "rewrite it without the branch (torch.where), or as a loop over the layers",
        ),
        RefusalKind(
            "P102",
            "too many choices of the config",
            "porter follows every path that a config can choose, so that the port is right for each of them. "
            "Independent choices multiply, and what was not followed could compute anything.",
            "write into the file what the checkpoint's config says of the fields that are named",
        ),
        RefusalKind(
            "P110",
            "no causal language model",
            "the file has no class with a forward that ends in logits over the vocabulary, or no path through it "
            "that runs to its end.",
            "name the modeling file of a decoder with a *ForCausalLM or *LMHeadModel class",
        ),
        RefusalKind(
            "P111",
            "no head that stands alone",
            "the engine computes logits only at the tokens that it samples. It needs to find the one place where "
            "hidden states become logits.",
            "end forward in an unconditional call of the head",
        ),
        RefusalKind(
            "P200",
            "attention that is not understood",
            "an attention was found, but a trait of it (mask, bias, heads, scaling, rotation) computes something that "
            "no attention layer of the runtime computes. Recognition is checked on numbers; near is not enough.",
            "see `porter explain attend` for what is understood; bring the attention into that form",
        ),
        RefusalKind(
            "P201",
            "no attention, or another kind of mixer",
            "tokens reach the logits without a softmax over query-key products, and not through a layer that keeps "
            "its state in the cache that it is given: an encoder's mixer, or states kept in the module itself.",
            "use an engine that has a cache for this kind of layer",
        ),
        RefusalKind(
            "P202",
            "attention that a layer can't be put in place of",
            "the attention was understood, but its pieces are spread over methods or choices in a way that leaves no "
            "single place for a paged attention layer.",
            "bring projections, attention and output projection of one layer into one forward",
        ),
        RefusalKind(
            "P203",
            "a layer with a state that the runtime can't keep",
            "layers that mix tokens through a state are kept as the file has them, over the runtime's states: forward "
            "is given hidden states and the cache, and keeps its state by update_conv_state, update_recurrent_state, "
            "has_previous_state, conv_states and recurrent_states. This one needs more than that.",
            "keep the state through these calls, in the forward of the layer itself",
        ),
        RefusalKind(
            "P300",
            "an operation that mixes tokens",
            "the port's tensors hold the tokens of many sequences one after the other. Outside of attention, an "
            "operation along the sequence or over all tokens would mix requests.",
            "rewrite it for one token at a time",
        ),
        RefusalKind(
            "P400",
            "something that the port would still need",
            "after the rewriting the file imports or reads something that the runtime does not have, or that "
            "depends on the shape of a batch.",
            "replace it in the source by plain torch",
        ),
        RefusalKind(
            "P900",
            "a mistake of porter",
            "the rewriting did not come to a good end. Nothing is written, because it could be wrong.",
            "report the file",
        ),
    )
}
