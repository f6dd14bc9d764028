"""The Hugging Face hub: whether it answers, its caches alone, its progress bars silenced."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

_PROBE_SECONDS = 10.0


def hub_reachable(seconds: float = _PROBE_SECONDS) -> bool:
    """Return whether the hub answers within some seconds; False at once in offline mode (HF_HUB_OFFLINE).

    Asked first because the hub's client by itself retries for 23 seconds where a name does not resolve, and for
    more than a minute where packets are dropped.
    """
    if datasets.config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        # Any answer will do, an error's too; and any failure means the same.
        with contextlib.suppress(Exception):
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds)
            answered.set()

    # A thread, since no time limit of the client covers the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Restrict `datasets` and `huggingface_hub` to their caches, without a try at the network."""
    switches: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from drawing bars and logging on the user's terminal; its errors still arrive as exceptions."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def why(error: BaseException) -> str:
    """Return the reason of an error, for a sentence."""
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    if any(isinstance(link, LocalEntryNotFoundError) for link in links):
        return "the hub does not answer, and there is no copy in the cache"
    return reason(error).rstrip(".")


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type; the exception that caused it goes before it."""
    while error.__cause__ is not None:  # libraries wrap the reason in general words
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
