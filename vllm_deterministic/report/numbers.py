"""Numbers as a reader wants them."""


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, without an exponent where one would not be said: 12,345, 0.125, 1.2e-07."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
