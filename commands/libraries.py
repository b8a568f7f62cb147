"""The libraries kept quiet: results and our own progress are what a user reads."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Loading bars and chatter of the libraries off: one progress bar at a time is ours."""
    # Said aloud, tokenizers encode on all cores and do not warn where a process forks after that; none of ours does.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft 0.21 asks transformers 5.23 by the old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # What a file lacks is said by the error; a log line before it would only be in another tongue.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
