"""Symbolic execution of a modeling file: one run follows one path, over symbolic tensors, sizes and config fields."""

from __future__ import annotations

from collections import Counter

import libcst as cst

from porter.analyze.facts import Facts, World, line_of
from porter.analyze.module_paths import name_modules
from porter.analyze.program import ClassInfo, FunctionInfo, Program
from porter.analyze.run import Infeasible
from porter.analyze.statements import Statements
from porter.analyze.values import Config, Function, Instance, Repeated, Tensor, Value, const
from porter.errors import Refusal

PATH_LIMIT = 128


# What a forward argument is bound to when the engine calls it: full sequences, no cache, no training outputs.
OFF = frozenset({"use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "use_legacy_cache"})


ON = frozenset({"return_dict"})


def explore(
    program: Program,
    entry: ClassInfo | None = None,
    flat: bool = False,
    number_paths: bool = True,
    raised: tuple[frozenset[tuple[str, bool]], ...] = (),
) -> Facts:
    """Run the entry class once for every path that its config can choose.

    Without `number_paths`, conditions that only pick a formula by arithmetic (a power of two?) take their usual side.
    `raised` are the paths on which the file as it came raises: sizes that never meet tell that only of that file, since
    one that is half rewritten may have such sizes for a while.

    Raises:
        Refusal: a path is not understood, none runs to the end, or there are more than PATH_LIMIT.
    """
    entry = entry or program.entry()
    if entry is None:
        raise Refusal(
            "",
            0,
            "no causal language model class",
            "no *ForCausalLM or *LMHeadModel class with a forward",
            "name a decoder's modeling file",
            "P110",
        )
    worlds: list[World] = []
    todo: list[tuple[tuple[str, bool], ...]] = [()]
    raising: list[frozenset[tuple[str, bool]]] = list(raised)
    stop: cst.CSTNode | None = None
    runs = 0
    while todo:
        prefix = todo.pop()
        runs += 1
        if runs > PATH_LIMIT:
            raise _too_many(entry, worlds)
        run = Interp(program, prefix, flat, number_paths)
        try:
            world = run.run(entry)
            if not any(decisions <= set(run.trail) for decisions in raised):
                worlds.append(world)
        except Infeasible as error:
            stop = stop or error.node
            raising.append(frozenset(run.trail))
        trail = run.trail
        todo += [(*trail[:i], (trail[i][0], not trail[i][1])) for i in range(len(prefix), len(trail))]
    if not worlds:
        raise _all_raise(program, entry, stop)
    kept = {decision for world in worlds for decision in world.decisions}
    _forget(worlds, {decision for decisions in raising for decision in decisions} - kept)
    return Facts(program, entry, worlds, raised=tuple(raising))


def _too_many(entry: ClassInfo, worlds: list[World]) -> Refusal:
    """What was not seen could compute anything: facts about some of the paths are none about the file."""
    counts = Counter(test for world in worlds for test in dict(world.decisions))
    tests = ", ".join(test for test, _ in counts.most_common(4))
    why = f"its config chooses between more than {PATH_LIMIT} paths (by {tests}, ...)"
    return Refusal("", 0, entry.name, why, "write into the file what the checkpoint's config says of these", "P102")


def _forget(worlds: list[World], raising: set[tuple[str, bool]]) -> None:
    """Tests need not ask for what makes every path of the original raise."""
    for world in worlds:
        for node, tests in world.open_tests.items():
            for condition, truth, outcome in tests:
                if (condition, truth) in raising and len(tests) == 1:
                    world.branches[node].discard(outcome)


def _all_raise(program: Program, entry: ClassInfo, stop: cst.CSTNode | None) -> Refusal:
    """No path runs to its end: the first check that stops one says what the model wants and the engine has not."""
    remedy = "the engine gives token ids and positions alone; make the rest optional, or port the decoder inside"
    if stop is None:
        return Refusal("", 0, entry.name, "every path through its forward raises", remedy, "P110")
    if isinstance(stop, cst.Call):
        what = " ".join(program.tree.code_for_node(stop.func).split())[:90]
        why = "what is called here is made from a config, not by a class of this file"
        return Refusal(
            "", line_of(program.tree, stop), what, why, "convert the language model that it stands for", "P110"
        )
    told = program.tree.code_for_node(stop.test if isinstance(stop, cst.If) else stop).strip()
    what = f"if {told}: raise" if isinstance(stop, cst.If) else " ".join(told.split())[:120]
    why = f"every path through the forward of {entry.name} raises, the first one here"
    return Refusal("", line_of(program.tree, stop), what, why, remedy, "P110")


class Interp(Statements):
    """One path, from the entry class to its result."""

    def run(self, entry: ClassInfo) -> World:
        config = Config(op="config")
        model = self.instantiate(entry, [config], self._quantization(entry), None)
        self.world.entry = model if isinstance(model, Instance) else None
        forward = self.program.method(entry, "forward")
        if forward is None:
            raise Refusal("", 0, entry.name, "it has no forward", "name a decoder's modeling file", "P110")
        bound = self._entry_arguments(forward)
        assert isinstance(model, Instance)
        name_modules(model)
        self.world.result = self.call(Function(info=forward, bound=model), [], bound, None)
        for extra in ("compute_logits",):
            method = self.program.method(entry, extra)
            if method is not None:
                self.world.result = self.call(Function(info=method, bound=model), [self.world.result], {}, None)
        self.world.decisions = tuple(self.trail)
        return self.world

    def _quantization(self, entry: ClassInfo) -> dict[str, Value]:
        """A port's entry also takes the engine's linear_method."""
        init = self.program.method(entry, "__init__")
        names = {p.name.value for p in init.node.params.params} if init is not None else set()
        return {"linear_method": Value(op="linear_method")} if "linear_method" in names else {}

    def _entry_arguments(self, forward: FunctionInfo) -> dict[str, Value]:
        bound: dict[str, Value] = {}
        params = forward.node.params
        for param in (*params.params, *params.kwonly_params):
            name = param.name.value
            if name == "input_ids":
                bound[name] = Tensor(op="input_ids", shape=self.tokens())
            elif name == "positions" or (name == "position_ids" and not self.program.counts_positions):
                bound[name] = Tensor(op="positions", shape=self.tokens(), attrs={"sizes_only": True})
            elif name == "position_ids":
                bound[name] = const(None)
            elif name == "kv_caches":
                bound[name] = Repeated(op="kv_caches", item=Value(op="kv_cache"))
            elif name == "attn_metadata":
                bound[name] = Value(op="attn_metadata")
            elif name in OFF:
                bound[name] = const(False)
            elif name in ON:
                bound[name] = const(True)
        return bound
