"""The span of each variable, and the bytes of the tangents."""

from partnewton.engines.adjoint.dataflow import is_variable
from partnewton.engines.adjoint.op import Loop, Op
from partnewton.engines.adjoint.program import Program
from partnewton.engines.adjoint.spans import Span, hull
from partnewton.engines.compat import Variable

__all__ = ["bytes_of_a_row", "spans_in", "spans_in_loop"]

Spans = dict[Variable, Span]


def spans_in(program: Program, spans: Spans) -> Spans:
    """The span of the tangent of each variable, from the spans of the inputs."""
    found = dict(spans)
    for op in program.ops:
        read = [found[v] for v in op.read if v in found]
        if op.rule is None or not read:
            continue
        if op.loop:
            inside = spans_in_loop(op.loop, _spans_of_body_inputs(op, found))
            results = [op.loop.body.outputs[i] for i in op.active_outputs]
            pairs = zip(op.written, results, strict=True)
            found.update((v, inside[w]) for v, w in pairs if w in inside)
        else:
            found.update(dict.fromkeys(op.written, hull(read)))
    return found


def spans_in_loop(loop: Loop, spans: Spans) -> Spans:
    """The spans in the body of a scan, which include those of all iterations."""
    _, carry, _ = loop.split(loop.inputs)
    results = loop.body.outputs[: loop.num_carry]
    while True:
        found = spans_in(loop.body, spans)
        grown = dict(spans)
        for v, w in zip(carry, results, strict=True):
            # A result may be a literal, which is constant and not hashable.
            both = [spans.get(v), found.get(w) if is_variable(w) else None]
            both = [span for span in both if span is not None]
            if both:
                grown[v] = hull(both)
        if grown == spans:
            return found
        spans = grown


def _spans_of_body_inputs(op: Op, spans: Spans) -> Spans:
    """The spans of the inputs of the body of a scan."""
    pairs = [(op.loop.inputs[i], op.inputs[i]) for i in op.active_inputs]
    return {v: spans[w] for v, w in pairs if w in spans}


def bytes_of_a_row(program: Program, spans: Spans) -> int:
    """The bytes that the largest operation writes, divided by the number of subsets."""
    everyone = hull(list(spans.values())) if spans else Span(0, 1)
    found = spans_in(program, spans)
    most = 1
    for op in program.ops:
        written = [v for v in op.written if v in found]
        size = sum(_bytes(v) * found[v].count for v in written)
        most = max(most, -(-size // everyone.count))
        if op.loop:
            entering = _spans_of_body_inputs(op, found)
            inside = {op.loop.inputs[i]: everyone for i in op.active_inputs}
            most = max(most, bytes_of_a_row(op.loop.body, inside | entering))
    return most


def _bytes(variable: Variable) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize
