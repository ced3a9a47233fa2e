"""Tables and the JSON line of the engines' benchmark."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from speed.session import LONG_PROMPT, SHORT_PROMPTS, Measured

LARGE, SMALL = "0.3b", "26m"
Key = tuple[str, int, str]
"""Shape, threads, engine."""

_TITLES = {
    "ours": "Ebbflow, INT4",
    "llamacpp": "llama.cpp, Q4_0",
    "onnx": "ONNX Runtime GenAI, INT4",
    "torch": "torch, INT4 kernel",
    "transformers": "transformers, bf16",
}


@dataclass(frozen=True)
class Figures:
    """What all rounds found."""

    runs: dict[Key, list[Measured]]
    bandwidths: dict[int, list[float]]
    """10^9 bytes per second, by threads."""

    def median(self, key: Key, of: Callable[[Measured], float]) -> float | None:
        """The median of the rounds; None for what was not measured."""
        runs = self.runs.get(key)
        return statistics.median(of(run) for run in runs) if runs else None

    def bandwidth(self, threads: int) -> float | None:
        """The median of the rounds, in 10^9 bytes per second."""
        found = self.bandwidths.get(threads)
        return statistics.median(found) if found else None

    def share(self, key: Key) -> float | None:
        """Weights that a decoding stream reads in a second over what memory gives."""
        bandwidth = self.bandwidth(key[1])
        read = self.median(key, lambda run: run.decode * run.weights_bytes)
        return read / bandwidth / 1e9 if read and bandwidth else None


def first_token_ms(tokens: int) -> Callable[[Measured], float]:
    """Reads the time to the first token of a prompt."""
    return lambda run: run.first_token_ms[str(tokens)]


def show(found: Figures) -> None:
    """Prints a table for each shape and number of threads."""
    for shape, threads in dict.fromkeys(key[:2] for key in found.runs):
        bandwidth = found.bandwidth(threads)
        read = f"; memory reads {bandwidth:.1f} GB/s" if bandwidth else ""
        title = f"Shape {shape}, {threads} thread{'s' * (threads > 1)}{read}"
        table = Table(title=title, caption="medians; first token of prompts; decode, lowest to highest")
        table.add_column("engine", no_wrap=True)
        headings = [f"first, {tokens:,}" for tokens in (*SHORT_PROMPTS, LONG_PROMPT)]
        headings += ["decode", "in rounds", "8 streams", "of bound", "resident", "peak", "load", "swap"]
        for heading in headings:
            table.add_column(heading, justify="right")
        for key in sorted(key for key in found.runs if key[:2] == (shape, threads)):
            table.add_row(_TITLES[key[2]], *_row(found, key))
        Console(width=160).print(table)


def _row(found: Figures, key: Key) -> Sequence[str]:
    def text(of: Callable[[Measured], float], form: str) -> str:
        return form.format(found.median(key, of))

    share = found.share(key)
    decodes = [run.decode for run in found.runs[key]]
    return [
        *(text(first_token_ms(tokens), "{:.1f} ms") for tokens in (*SHORT_PROMPTS, LONG_PROMPT)),
        text(lambda run: run.decode, "{:.1f}/s"),
        f"{min(decodes):.0f} to {max(decodes):.0f}",
        text(lambda run: run.streams, "{:.0f}/s"),
        "" if share is None else f"{share:.2f}",
        text(lambda run: run.rss_mb, "{:.0f} MB"),
        text(lambda run: run.peak_mb, "{:.0f} MB"),
        text(lambda run: 1e3 * run.load_s, "{:.0f} ms"),
        text(lambda run: 1e3 * run.swap_s, "{:.0f} ms"),
    ]


def summary(found: Figures) -> dict[str, dict[str, float]]:
    """The last line: our figures, the rivals', and how many times faster ours is."""
    metrics: dict[str, float] = {}
    rivals: dict[str, float] = {}
    for key in found.runs:
        shape, threads, name = key
        suffix = ("" if shape == LARGE else f"_{shape}") + ("" if threads == 1 else f"_{threads}_threads")
        into, prefix = (metrics, "") if name == "ours" else (rivals, f"{name}_")
        into |= {f"{prefix}{figure}{suffix}": value for figure, value in _figures(found, key).items()}
    for threads in found.bandwidths:
        metrics[f"bandwidth_gb_s_{threads}_thread{'s' * (threads > 1)}"] = round(found.bandwidth(threads) or 0, 2)
    return {"metrics": metrics, "rivals": rivals, "ratios": _ratios(found)}


def _figures(found: Figures, key: Key) -> dict[str, float]:
    read: dict[str, Callable[[Measured], float]] = {
        "first_token_ms": first_token_ms(128),
        "first_token_16_ms": first_token_ms(16),
        "first_token_1024_ms": first_token_ms(1024),
        "decode_tokens_s": lambda run: run.decode,
        "batch8_tokens_s": lambda run: run.streams,
        "rss_mb": lambda run: run.rss_mb,
        "peak_rss_mb": lambda run: run.peak_mb,
        "load_ms": lambda run: 1e3 * run.load_s,
        "swap_ms": lambda run: 1e3 * run.swap_s,
    }
    return {name: round(found.median(key, of) or 0, 2) for name, of in read.items()}


def _ratios(found: Figures) -> dict[str, float]:
    ratios: dict[str, float | None] = {}
    for threads in (1, 2):
        suffix = "" if threads == 1 else "_2_threads"
        decode = _times_faster(found, LARGE, threads, lambda run: run.decode)
        ratios[f"decode_vs_llamacpp{suffix}"] = decode
        ratios[f"prefill_vs_llamacpp{suffix}"] = _times_faster(
            found, LARGE, threads, lambda run: 1 / run.first_token_ms["128"]
        )
        ratios[f"batch8_vs_llamacpp{suffix}"] = _times_faster(found, LARGE, threads, lambda run: run.streams)
        ratios[f"decode_26m_vs_llamacpp{suffix}"] = _times_faster(found, SMALL, threads, lambda run: run.decode)
    ratios["bandwidth_share_1_thread"] = found.share((LARGE, 1, "ours"))
    ratios["bandwidth_share"] = found.share((LARGE, 2, "ours"))
    return {name: round(ratio, 3) for name, ratio in ratios.items() if ratio}


def _times_faster(found: Figures, shape: str, threads: int, of: Callable[[Measured], float]) -> float | None:
    ours, theirs = (found.median((shape, threads, name), of) for name in ("ours", "llamacpp"))
    return ours / theirs if ours and theirs else None
