"""Which small bugs no test notices: two steps, by hand, not part of .ci/run; see CONTRIBUTING.

    python -m tests.mutation map FOLDER PLACE/map-NAME.json TESTS...
    python -m tests.mutation run FOLDER PLACE/FILE.jsonl TESTS... [--sample 80 --seed 0 --part 0/1]

`map` runs the tests once and writes which of them run which line of the package's FOLDER. `run` draws
changes of it at random, and for each forks this process, in which everything is imported and collected
already, makes the change live and runs the tests of that line (of all maps in PLACE) until one fails.
Lines of FILE.jsonl are kept: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.mutation.changes import changes, make_live

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tl_bilinear"
LEFT = ("survived", "no test")
SHARE = 60.0  # seconds of tests for one change, by their times without it


class Mapper:
    """Which tests run a line, tests of a shared fixture among them, and how long each takes."""

    def __init__(self, folder: str, path: Path) -> None:
        from coverage import Coverage

        self.folder, self.path = folder, path
        self.coverage = Coverage(data_file=None, include=[str(PACKAGE / folder / "*")])
        self.users: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.test = ""

    def pytest_collection_finish(self) -> None:
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test, start = item.nodeid, time.perf_counter()
        self.coverage.switch_context(self.test)
        result = yield
        self.seconds.setdefault(self.test, time.perf_counter() - start)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        self.coverage.switch_context(self._shared(fixturedef))
        result = yield
        self.coverage.switch_context(self.test)
        return result

    def _shared(self, fixture) -> str:
        return f"fixture {fixture.baseid} {fixture.argname}"

    def pytest_itemcollected(self, item) -> None:
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            for one in definitions:
                self.users[self._shared(one)].add(item.nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed or report.skipped:
            self.seconds[report.nodeid] = -1.0  # says nothing about a change

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for file in data.measured_files():
            here = lines[str(Path(file).relative_to(ROOT))] = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {t for c in contexts if c for t in self.users.get(c, {c})}
                here[line] = sorted(t for t in tests if self.seconds.get(t, -1) >= 0)
        self.path.write_text(json.dumps({"lines": lines, "seconds": self.seconds}))


class Runner:
    """Draws changes and runs, in a child each, the tests of their lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.killer = options, ""
        maps = [
            json.loads(path.read_text()) for path in sorted(options.file.parent.glob("map-*.json"))
        ]
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.seconds: dict[str, float] = {}
        for one in maps:
            self.seconds |= one["seconds"]
            for file, lines in one["lines"].items():
                for line, tests in lines.items():
                    self.lines[file][int(line)] |= set(tests)

    def sample(self) -> list[tuple[Path, int]]:
        files = sorted((PACKAGE / self.options.folder).glob("*.py"))
        every = [(f, i) for f in files for i in range(len(changes(ast.parse(f.read_text()))))]
        if self.options.again:
            before = map(json.loads, self.options.again.read_text().splitlines())
            kept = {
                (ROOT / each["file"], each["index"]) for each in before if each["outcome"] in LEFT
            }
            return [each for each in every if each in kept]
        drawn = random.Random(self.options.seed).sample(every, min(self.options.sample, len(every)))
        print(f"{len(every)} changes in {self.options.folder}, {len(drawn)} drawn", flush=True)
        part, parts = map(int, self.options.part.split("/"))
        return drawn[part::parts]

    def pytest_runtestloop(self, session) -> bool:
        items = {item.nodeid: item for item in session.items}
        path = self.options.file
        known = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        done = {(line["file"], line["index"]) for line in known}
        with path.open("a") as out:
            for file, index in self.sample():
                name = str(file.relative_to(ROOT))
                if (name, index) in done:
                    continue
                line = self._judge(file, index, self._tests(file, index, items))
                print(json.dumps({"file": name, "index": index, **line}), file=out, flush=True)
                known.append(line)
        print(Counter(line["outcome"] for line in known))
        return True

    def _tests(self, file: Path, index: int, items: dict) -> list:
        """The tests of a line, for `SHARE` seconds: those of its own folder first, quick ones first."""
        change = changes(ast.parse(file.read_text()))[index]
        lines = self.lines[str(file.relative_to(ROOT))]
        # A default, or a line of a statement that goes on, has the tests of the next line that has any.
        near = (
            lines[n]
            for n in [*range(change.line, change.line + 90), *range(change.line, change.start, -1)]
            if lines.get(n)
        )
        names = [name for name in next(near, ()) if name in items]
        if self.options.again:  # all tests of the files that reach the line
            files = {name.split("::")[0] for name in names}
            names = [n for n in items if n.split("::")[0] in files and self.seconds.get(n, -1) >= 0]
        own = f"tests/{file.parent.name}/"
        names.sort(key=lambda name: (not name.startswith(own), self.seconds[name]))
        kept, left = [], SHARE * (5 if self.options.again else 1)
        for name in names:
            left -= self.seconds[name]
            if left > 0 or not kept:
                kept.append(items[name])
        return kept

    def _judge(self, file: Path, index: int, tests: list) -> dict:
        change = changes(ast.parse(file.read_text()))[index]
        found = {
            "line": change.line,
            "function": change.function,
            "words": change.words,
            "tests": len(tests),
        }
        if not tests:
            return {**found, "outcome": "no test"}
        limit, start = 20 + 4 * sum(self.seconds[t.nodeid] for t in tests), time.perf_counter()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self._child(file, index, tests, writing)
        os.close(writing)
        status = None
        while time.perf_counter() - start < limit:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.02)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = None
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        codes = {0: "survived", 1: "killed", 3: "not made"}
        code = (
            "never ends"
            if status is None
            else codes.get(os.waitstatus_to_exitcode(status), "killed")
        )
        return {
            **found,
            "outcome": code,
            "said": said[-300:],
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _child(self, file: Path, index: int, tests: list, writing: int) -> None:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        code = 3
        try:
            make_live(file, index)
            self.killer, code = "", 0
            for item, after in zip(tests, [*tests[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if self.killer:
                    os.write(writing, self.killer.encode())
                    code = 1
                    break
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(code)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.killer = report.nodeid


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("step", choices=["map", "run"])
    parser.add_argument(
        "folder", help="of the package: tensor, features, hooks; empty for all (map)"
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--sample", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="one of several processes")
    parser.add_argument("--again", type=Path, help="only what survived there, with more tests")
    options = parser.parse_args()
    plugin = Mapper(options.folder, options.file) if options.step == "map" else Runner(options)
    return int(
        pytest.main(
            [*options.tests, "-p", "no:cacheprovider", "-m", "not campaign"], plugins=[plugin]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
