"""GPU kernels whose results are known not to repeat bitwise, and how a program's text shows them.

The text is XLA's, compiled or lowered (`as_text()`), or the PTX of its kernels.
"""

import re

UNREPEATABLE = {
    # Equal indices are added up by atomics, in the order in which threads happen to arrive. XLA
    # computes a scatter that it may not assume to be unique in that way.
    "scatter": r"(?<![-\w])scatter\((?!.*\bunique_indices=true)",
    "select-and-scatter": r"\bselect-and-scatter\(",
    # cuDNN may add up the gradient of q with atomics. Without a GPU the text does not say.
    "cuDNN's gradient of attention": r'fmha\w*Backward.*"force_deterministic": ?false',
    # In PTX: every other kernel that adds up in an order of its own.
    "atomics": r"^\s*(@!?%p\d+\s+)?(atom|red)\.(?=.*\badd\b|.*\bcas\b)",
}


def unrepeatable(text: str) -> list[str]:
    """Return the names of the kernels in the text that are known not to repeat."""
    return [name for name, form in UNREPEATABLE.items() if re.search(form, text, re.MULTILINE)]
