"""Worked problems with numbers from a hash: as plain text with LaTeX, and as conversations with a calculator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import comb

from textmaking.catalogue import EVALUATION, Pick
from textmaking.chat import Turn, render

Problem = tuple[str, str, str, str]
"""Question, steps, answer, and the expression that a calculator needs."""


def _number(low: int, high: int, *key: object) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


def _polynomial(coefficients: Sequence[int]) -> str:
    """The polynomial in LaTeX, from the highest power; terms with the coefficient 0 are left out."""
    terms = []
    for power, c in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        variable = {0: "", 1: "x"}.get(power, f"x^{power}")
        if c:
            size = "" if abs(c) == 1 and variable else str(abs(c))
            terms.append(f"{'-' if c < 0 else '+'} {size}{variable}")
    text = " ".join(terms) or "+ 0"
    return text[2:] if text[0] == "+" else f"-{text[2:]}"


def _quadratic(seed: int) -> Problem:
    r, s, a = (_number(-9, 9, "q", seed, i) for i in range(3))
    a = a or 2
    b, c = -a * (r + s), a * r * s
    d = b * b - 4 * a * c
    steps = (
        f"The discriminant is $\\Delta = b^2 - 4ac = ({b})^2 - 4 \\cdot ({a}) \\cdot ({c}) = {d}$. "
        f"Its root is ${abs(a * (r - s))}$, hence\n\n"
        f"$$x_{{1,2}} = \\frac{{{-b} \\pm {abs(a * (r - s))}}}{{{2 * a}}}.$$"
    )
    return (
        f"Solve ${_polynomial((a, b, c))} = 0$.",
        steps,
        f"$x \\in \\{{{min(r, s)}, {max(r, s)}\\}}$",
        f"({b})**2 - 4*({a})*({c})",
    )


def _euclid(seed: int) -> Problem:
    g = _number(2, 40, "e", seed, 0)
    a, b = g * _number(30, 400, "e", seed, 1), g * _number(11, 300, "e", seed, 2)
    a, b = max(a, b), min(a, b)
    x, y, lines = a, b, []
    while y:
        lines.append(f"{x} = {x // y} · {y} + {x % y}")
        x, y = y, x % y
    return (
        f"Find the greatest common divisor of {a} and {b}, and their least common multiple.",
        "Euclid's algorithm:\n\n" + "\n".join(lines),
        f"gcd({a}, {b}) = {x} and lcm({a}, {b}) = {a * b // x}",
        f"{a} * {b} // {x}",
    )


def _derivative(seed: int) -> Problem:
    c = [_number(-12, 12, "d", seed, i) or 3 for i in range(5)]
    x = _number(-5, 5, "d", seed, 9)
    slope = [v * (4 - i) for i, v in enumerate(c[:4])]
    value = sum(v * x ** (3 - i) for i, v in enumerate(slope))
    return (
        f"Let $f(x) = {_polynomial(c)}$. Compute $f'(x)$ and the slope of the tangent at $x = {x}$.",
        f"Each power falls by one: $\\frac{{d}}{{dx}} x^n = n x^{{n-1}}$, so\n\n$$f'(x) = {_polynomial(slope)}.$$",
        f"$f'({x}) = {value}$",
        " + ".join(f"({v})*({x})**{3 - i}" for i, v in enumerate(slope)),
    )


def _system(seed: int) -> Problem:
    a, b, c, d = (_number(-9, 9, "s", seed, i) or 1 for i in range(4))
    if a * d == b * c:
        a += 1 if d else 2
    if a * d == b * c:
        d += 1
    x, y = _number(-12, 12, "s", seed, 5), _number(-12, 12, "s", seed, 6)
    e, f, det = a * x + b * y, c * x + d * y, a * d - b * c
    return (
        f"Solve the system $${a}x {b:+d}y = {e}, \\qquad {c}x {d:+d}y = {f}.$$",
        f"By Cramer's rule the determinant is ${a} \\cdot ({d}) - ({b}) \\cdot ({c}) = {det}$, and\n\n"
        f"$$x = \\frac{{{e * d - b * f}}}{{{det}}}, \\qquad y = \\frac{{{a * f - e * c}}}{{{det}}}.$$",
        f"$x = {x}$, $y = {y}$",
        f"({a})*({d}) - ({b})*({c})",
    )


def _binomial(seed: int) -> Problem:
    n, k = _number(6, 24, "b", seed, 0), _number(2, 5, "b", seed, 1)
    p = Fraction(1, _number(2, 6, "b", seed, 2))
    value = comb(n, k) * p**k * (1 - p) ** (n - k)
    return (
        f"An experiment succeeds with probability {p}. It is repeated {n} times. "
        f"What is the probability of exactly {k} successes?",
        f"There are $\\binom{{{n}}}{{{k}}} = {comb(n, k)}$ ways to place the successes; each has the probability "
        f"$\\left({p}\\right)^{{{k}}} \\left({1 - p}\\right)^{{{n - k}}}$.",
        f"$P(X = {k}) = {comb(n, k)} \\cdot \\left({p}\\right)^{{{k}}} \\cdot \\left({1 - p}\\right)^{{{n - k}}} "
        f"\\approx {float(value):.6f}$",
        f"{comb(n, k)} * ({p})**{k} * ({1 - p})**{n - k}",
    )


def _modular(seed: int) -> Problem:
    base, power, m = (
        _number(2, 40, "m", seed, 0),
        _number(20, 200, "m", seed, 1),
        _number(7, 99, "m", seed, 2),
    )
    lines, square, bits, result = [], base % m, power, 1
    while bits:
        if bits & 1:
            result = result * square % m
        lines.append(f"bit {bits & 1}: square = {square}, result = {result}")
        square, bits = square * square % m, bits >> 1
    return (
        f"What is the remainder of {base}^{power} when divided by {m}?",
        f"Square and multiply, from the lowest bit of {power} = 0b{power:b}:\n\n" + "\n".join(lines),
        f"{base}^{power} ≡ {result} (mod {m})",
        f"pow({base}, {power}, {m})",
    )


def _series(seed: int) -> Problem:
    a, d, n = _number(-20, 60, "a", seed, 0), _number(2, 15, "a", seed, 1), _number(10, 90, "a", seed, 2)
    last = a + (n - 1) * d
    return (
        f"An arithmetic sequence begins with {a} and grows by {d}. What is the sum of its first {n} terms?",
        f"The last term is $a_n = a_1 + (n-1)d = {a} + {n - 1} \\cdot {d} = {last}$. Pairs of the first and the last "
        f"term all have the sum ${a + last}$, so $S_n = \\frac{{n}}{{2}}(a_1 + a_n)$.",
        f"$S_{{{n}}} = {n * (a + last) // 2}$",
        f"{n} * ({a} + {last}) // 2",
    )


def _mixture(seed: int) -> Problem:
    p, q = _number(5, 30, "x", seed, 0), _number(45, 90, "x", seed, 1)
    total, wanted = _number(4, 60, "x", seed, 2), _number(32, 43, "x", seed, 3)
    strong = Fraction(total * (wanted - p), q - p)
    return (
        f"How many litres of a {q} % solution and of a {p} % solution give {total} litres of {wanted} %?",
        f"Let x be the litres of the stronger one. Then {q}x + {p}({total} − x) = {wanted} · {total}, "
        f"so {q - p}x = {total * (wanted - p)}.",
        f"x = {strong} litres of {q} % and {total - strong} litres of {p} %",
        f"{total} * ({wanted} - {p}) / ({q} - {p})",
    )


KINDS: tuple[Callable[[int], Problem], ...] = (
    _quadratic,
    _euclid,
    _derivative,
    _system,
    _binomial,
    _modular,
    _series,
    _mixture,
)
HELD_OUT: tuple[Callable[[int], Problem], ...] = (_modular, _mixture)
"""The kinds that only the evaluation text holds."""


def _drawn(pick: Pick, first: int) -> Iterator[tuple[int, Problem]]:
    kinds = HELD_OUT if pick.use == EVALUATION else tuple(kind for kind in KINDS if kind not in HELD_OUT)
    for seed in range(first, first + 600):
        yield seed, kinds[seed % len(kinds)](seed)


def documents(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """Ten worked problems a document."""
    held = []
    for seed, (question, steps, answer, _) in _drawn(pick, 0):
        held.append(f"**Problem {seed + 1}.** {question}\n\n{steps}\n\nAnswer: {answer}.")
        if len(held) == 10:
            yield f"problems#{seed}", "\n\n".join(held)
            held = []


def tutoring(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """Four problems a conversation; the model thinks, calls a calculator, and answers with the steps."""
    turns: list[Turn] = []
    for seed, (question, steps, answer, expression) in _drawn(pick, 1000):
        value = eval(expression, {"__builtins__": {}, "pow": pow})
        shown = f"{value:.6f}" if isinstance(value, float) else str(value)
        turns += [
            Turn("user", question),
            Turn("ai", thought=f"I need {expression}.", calls=[("calculate", {"expression": expression})]),
            Turn("tool", shown),
            Turn("ai", f"{steps}\n\nSo {answer}.", f"The calculator says {shown}."),
        ]
        if len(turns) == 16:
            yield f"tutoring#{seed}", render(turns, "tutoring", seed, tools=("calculate",))
            turns = []
