"""Conditions of a path: each open one is decided once and remembered."""

from __future__ import annotations

import libcst as cst

from porter.analyze import scalars
from porter.analyze.run import Infeasible, Run
from porter.analyze.values import Scalar, Value
from porter.errors import Refusal


class Conditions(Run):
    """Conditions on this path: known, implied by earlier ones, or decided here."""

    def truth(self, value: Value, node: cst.CSTNode | None) -> bool:
        """Whether a value is true on this path; an open config condition is decided and remembered."""
        known = scalars.known_truth(value)
        if known is not None:
            return known
        if isinstance(value, Scalar):
            key, wanted = scalars.condition(value)
            implied = scalars.implied(key, self.taken)
            if implied is None and "math." in key and not self.number_paths:
                implied = True
            if implied is None:
                implied = self.forced.get(key, True)
                self.trail.append((key, implied))
                self.taken[key] = implied
            return implied is wanted
        raise self.refuse(
            node, "a condition on a tensor", "its truth depends on data", "rewrite it without the branch", "P101"
        )

    def test(self, node: cst.BaseExpression) -> bool:
        """The truth of a test, short-circuited like Python, deciding one condition at a time."""
        if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
            result = not self.test(node.expression)
        elif isinstance(node, cst.BooleanOperation):
            left = self.test(node.left)
            stop = not left if isinstance(node.operator, cst.And) else left
            result = left if stop else self.test(node.right)
        else:
            value = self.eval(node)
            result = self.truth(value, node)
            if isinstance(value, Scalar) and scalars.known_truth(value) is None:
                self.world.branches[node].add(not result)
                key, wanted = scalars.condition(value)
                self.world.open_tests[node].add((key, result is not wanted, not result))
        self.world.branches[node].add(result)
        return result

    def quiet(self, node: cst.BaseExpression) -> Value:
        """Evaluate a test without deciding any open condition."""
        trail, taken = list(self.trail), dict(self.taken)
        value = self.eval(node)
        if (self.trail, self.taken) != (trail, taken):
            self.trail, self.taken = trail, taken
        return value

    def _plain(self, node: cst.BaseExpression) -> bool:
        """Whether a branch of a conditional expression is an open scalar, which needs no path of its own."""
        trail, taken = list(self.trail), dict(self.taken)
        try:
            value = self.eval(node)
        except (Refusal, Infeasible):
            return False
        decided = self.trail != trail
        self.trail, self.taken = trail, taken
        return isinstance(value, Scalar) and not decided
