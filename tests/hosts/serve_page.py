"""What a browser does on the page of `resprune serve`, as steps for `drive`."""

Step = dict[str, str]


def slid(tokens: int) -> list[Step]:
    """The slider at `tokens`."""
    move = f"(() => {{ const at = document.getElementById('tokens'); at.value = {tokens};"
    return [{"do": "read", "of": move + " at.dispatchEvent(new Event('input')); })()"}]


def asked(question: str, turn: int) -> list[Step]:
    """The question, and its answer, by keyboard alone, as soon as the page takes it."""
    return [
        {"do": "fill", "at": "#question", "value": question},
        {"do": "see", "at": "#send:not(:disabled)"},
        {"do": "focus", "at": "#question"},
        {"do": "press", "key": "Enter"},
        {"do": "see", "at": f"#log li:nth-child({2 * turn}) .facts span"},
    ]
