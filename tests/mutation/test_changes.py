"""Changes are found where they stand, and whoever has imported a function has the changed one."""

import ast
import importlib.util

from tests.mutation.changes import changes, make_live

SOURCE = '''
def outer(values, start=2, *, twice=True):
    """No change in words: 1 < 2."""
    def inner(x):
        return abs(x) + start
    if not values:
        raise ValueError(f"nothing of {len(values) + 1}")
    total = max(inner(x) for x in values)
    return 2 * total if twice else total


class Holder:
    def __init__(self, count):
        self.count = count

    @property
    def count_plus(self):
        return self.count + 1
'''


def module(path):
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("planted_in", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def results(found):
    said = [found.Holder(3).count_plus]
    for call in (
        lambda: found.outer([1, -5]),
        lambda: found.outer([1, -5], twice=False),
        lambda: found.outer([]),
    ):
        try:
            said.append(call())
        except ValueError as error:
            said.append(str(error))
    return said


def test_every_change_is_live_in_functions_imported_before(tmp_path):
    found = changes(ast.parse(SOURCE))
    words = [change.words for change in found]
    assert len(words) == len(set(words)) == 11
    assert "'" not in "".join(words)  # nothing of messages and docstrings
    before = results(module(tmp_path / "x.py"))
    assert before == [4, 14, 7, "nothing of 1"]
    for index, change in enumerate(found):
        planted = module(tmp_path / f"{index}.py")
        assert make_live(tmp_path / f"{index}.py", index).words == change.words
        assert results(planted) != before, change
