"""Builds, tests and measures on a GPU within minutes.

    python bench/gpu_check.py              all of it, in 340 seconds; JSON to $OUT or bench/results/
    python bench/gpu_check.py --only kernels,evaluations --out DIR
    python bench/gpu_check.py --dry-run    the script itself, on a CPU: tiny sizes, the interpreter

The parts: rates of the machine, tests, the build, kernels against their floors, whole evaluations.
Runs from a checkout, installed or not; a part whose packages are missing is left out, and named.
Cases run in a process of their own, which is started anew behind one that crashes or hangs. The
table comes last, and the exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Each part's share of the time that is left, in the order in which they run. The build goes on
# beside the first two.
PARTS = {"machine": 0.15, "tests": 0.35, "build": 0.4, "kernels": 0.45, "evaluations": 1.0}
# A case that has taken longer than this when the time is up has failed; another one was just begun
# too late.
_HANGS = 60.0
NEEDED = (
    "torch",
    "numpy",
    "triton",
    "pytest",
    "hypothesis",
    "safetensors",
    "pybind11",
    "setuptools",
    "tqdm",
)


def checkout(folder: Path) -> Path:
    """Fills a folder to import modeconn from, by links to the checkout's files.

    kernels/ is linked to where it would be installed.
    """
    package = folder / "modeconn"
    package.mkdir()
    for entry in (ROOT / "modeconn").iterdir():
        if entry.name != "kernels":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def environment(folder: Path, dry: bool) -> dict[str, str]:
    """Returns the environment of every process that is started."""
    paths = [folder, ROOT / "bench", ROOT / "tests"]
    more = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
    }
    more["MODECONN_TEST_DEVICE"] = "cpu" if dry else "cuda"
    if dry:
        more["TRITON_INTERPRET"] = "1"
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**kept, **more}


class Check:
    """A run of the check: its results so far, and the time that is left.

    Attributes:
        results: of each case, in order; "error" says what went wrong, "skipped" why there was
            nothing to do.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.env = environment(folder, options.dry_run)
        self.deadline = time.monotonic() + options.seconds
        self.missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        self.results: list[dict[str, Any]] = []
        self.building: subprocess.Popen[str] | None = None
        self.build_log = folder / "build.log"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, **result: Any) -> None:
        self.results.append(result)
        note = result.get("error") or result.get("skipped") or result.get("note", "")
        mark = "✗" if "error" in result else "–" if "skipped" in result else "✓"
        print(f"  {mark} {result['part']}: {result['case']} {note}".rstrip(), flush=True)

    def attempt(self, part: str) -> None:
        """Runs a part; its failure does not end the others."""
        try:
            self.run(part)
        except Exception as error:
            self.add(part=part, case="all", error=f"{type(error).__name__}: {error}")

    def run(self, part: str) -> None:
        """Runs a part, within its share of the time that is left."""
        share = max(10.0, PARTS[part] * self.left())
        lacking = [name for name in ("torch", "numpy") if name in self.missing]
        if self.left() < 5:
            self.add(part=part, case="all", skipped="no time left")
        elif part == "build":
            self.build(share)
        elif lacking and part != "machine":
            self.add(part=part, case="all", error=f"{', '.join(lacking)} not installed")
        elif part == "tests":
            self.tests(share)
        else:
            self.cases(part, share)

    def begin_build(self) -> None:
        """Starts to build the C++ extension in place, and the CUDA one where there is nvcc.

        A dry run builds nothing.
        """
        lacking = [name for name in ("setuptools", "pybind11") if name in self.missing]
        if lacking or self.options.dry_run:
            why = f"{', '.join(lacking)} not installed"
            if self.options.dry_run:
                why = "a dry run builds nothing"
            self.add(part="build", case="csrc", skipped=why)
            return
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with self.build_log.open("w") as stream:
            self.building = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=stream, stderr=subprocess.STDOUT
            )

    def build(self, seconds: float) -> None:
        """Waits for the build."""
        if self.building is None:
            return
        try:
            code = self.building.wait(seconds)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            self.building.kill()
            problem = "ended, its time was up"
        text = self.build_log.read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()[:1] in ("✓", "✗")]
        failed = {"error": f"setup.py: {problem}; {text.strip()[-300:]}"} if problem else {}
        self.add(part="build", case="csrc", note="; ".join(lines), **failed)
        for built in (ROOT / "modeconn").glob("*.so"):  # built after the links were made
            link = self.folder / "modeconn" / built.name
            if not link.exists():
                link.symlink_to(built)

    def tests(self, seconds: float) -> None:
        """Runs the tests marked gpu."""
        lacking = [name for name in ("pytest", "triton") if name in self.missing]
        if lacking:
            why = f"{', '.join(lacking)} not installed"
            self.add(part="tests", case="pytest -m gpu", skipped=why)
            return
        options = "-v -m gpu --tb=line --show-capture=no -p no:cacheprovider --rootdir".split()
        options += [
            str(ROOT),
            "-c",
            str(ROOT / "pyproject.toml"),
            str(ROOT / "tests" / "test_gpu.py"),
        ]
        if self.options.dry_run:
            options += ["-k", "linear"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options],
                cwd=self.folder,
                env=self.env,
                capture_output=True,
                text=True,
                timeout=min(seconds, self.left()),
                check=False,
            )
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            text, code = _text(late.stdout), -1
        lines = text.strip().splitlines() or ["no output"]
        ended = "its time was up" if code == -1 else lines[-1].strip("= ")
        passed = sum(" PASSED" in line for line in lines)
        failed = [
            line for line in lines if line.startswith(("FAILED", "ERROR")) or " FAILED" in line
        ]
        problem = {}
        if code:
            problem["error"] = "; ".join([ended, f"{passed} passed", *failed])[:2000]
        self.add(part="tests", case="pytest -m gpu", note=ended, output=text[-6000:], **problem)

    def cases(self, part: str, seconds: float) -> None:
        """Runs a part's cases; behind a crash the rest go on in a new process."""
        until = time.monotonic() + min(seconds, self.left())
        listed = self.worker(part, [], until)
        waiting = [line["case"] for line in listed if "listed" in line]
        if not waiting:
            self.add(part=part, case="all", error=_ended(listed))
            return
        while waiting and time.monotonic() < until:
            lines = self.worker(part, waiting, until)
            begun = self.collect(part, lines, until)
            if not begun:
                self.add(part=part, case=waiting[0], error=_ended(lines))
                begun = {waiting[0]}
            waiting = [case for case in waiting if case not in begun]
        for case in waiting:
            self.add(part=part, case=case, skipped="no time left")

    def collect(self, part: str, lines: list[dict[str, Any]], until: float) -> set[str]:
        """Adds the results among a process's lines, and returns the cases that were begun."""
        begun: dict[str, float] = {}
        for line in lines:
            if line.get("done"):
                self.add(part=part, **{key: v for key, v in line.items() if key != "done"})
            elif "case" in line:
                begun.setdefault(line["case"], line["at"])
        for case in begun.keys() - {line["case"] for line in lines if line.get("done")}:
            cut = lines[-1]["at"] - begun[case] < _HANGS and time.monotonic() >= until
            self.add(part=part, case=case, **{"skipped" if cut else "error": _ended(lines)})
        return set(begun)

    def worker(self, part: str, cases: list[str], until: float) -> list[dict[str, Any]]:
        """Runs cases in a process, or lists them, and returns the lines that it printed.

        The process is ended when its time is up.
        """
        known = [r for r in self.results if r["part"] == "machine" and "value" in r]
        order = {
            "cases": cases,
            "dry": self.options.dry_run,
            "seconds": until - time.monotonic() - 3,
            "machine": known,
        }
        command = [sys.executable, str(ROOT / "bench" / "gpu_cases.py"), part, json.dumps(order)]
        log = self.folder / "worker.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=stream, stderr=subprocess.STDOUT
            )
            try:
                process.wait(max(1.0, until - time.monotonic()))
                ended = f"exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = "ended, its time was up"
        printed = log.read_text(errors="replace").splitlines()
        other = [line for line in printed if _parsed(line) is None]
        last = {"ended": f"{ended} {' '.join(other[-3:])}".strip()[-500:], "at": time.time()}
        return [found for line in printed if (found := _parsed(line)) is not None] + [last]


def _parsed(line: str) -> dict[str, Any] | None:
    """Parses a line of JSON; None for any other."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _ended(lines: list[dict[str, Any]]) -> str:
    return next((line["ended"] for line in lines if "ended" in line), "")


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Formats the results, a line each."""
    yield f"{'part':<12}{'case':<44}{'time':>13}{'floor':>13}{'of floor':>10}  note"
    for r in results:
        time_, floor = r.get("ms"), r.get("floor_ms")
        shown = [f"{v:.4g} ms" if v is not None else "" for v in (time_, floor)]
        share = f"{floor / time_:.0%}" if time_ and floor else ""
        note = f"FAILED {r['error']}" if "error" in r else r.get("skipped") or r.get("note", "")
        line = f"{r['part']:<12}{r['case']:<44}{shown[0]:>13}{shown[1]:>13}{share:>10}"
        yield f"{line}  {note[:110]}".rstrip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", metavar="DIR", default=os.environ.get("OUT") or str(ROOT / "bench" / "results")
    )
    parser.add_argument("--seconds", type=float, default=340.0, help="for everything (default 340)")
    parser.add_argument(
        "--only", metavar="PART,…", default=",".join(PARTS), help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, with tiny sizes: checks the script"
    )
    options = parser.parse_args()
    if set(options.only.split(",")) - set(PARTS):
        parser.error(f"--only {options.only}: expected some of {','.join(PARTS)}")
    return options


def main() -> int:
    options = _options()
    requested = options.only.split(",")
    started = datetime.now(timezone.utc)
    with tempfile.TemporaryDirectory() as folder:
        check = Check(checkout(Path(folder)), options)
        if "build" in requested:
            check.begin_build()
        for part in PARTS:
            if part in requested:
                check.attempt(part)
    device = next((r["note"] for r in check.results if r["case"] == "device"), "no device")
    report = {
        "device": device,
        "date": started.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "missing": check.missing,
        "dry_run": options.dry_run,
        "seconds": options.seconds - check.left(),
        "results": check.results,
    }
    name = "".join(c if c.isalnum() else "-" for c in device.split(",")[0].lower()).strip("-")
    name = "dry-run" if options.dry_run else name
    target = Path(options.out) / f"{started:%Y-%m-%d}-gpu-check-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1), encoding="utf-8")
    failed = [r for r in check.results if "error" in r]
    missing = ", ".join(check.missing) or "nothing"
    print(f"\n{device}, {started:%Y-%m-%d}, {report['seconds']:.0f} s; not installed: {missing}")
    print("\n".join(table(check.results)))
    print(f"{len(failed)} failed; written to {target}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
