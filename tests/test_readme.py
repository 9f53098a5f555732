"""What the README shows is what happens."""

import doctest
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_examples() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_derivative_by_hand(capsys) -> None:
    runpy.run_path(str(ROOT / "examples" / "derivative_by_hand.py"), run_name="__main__")
    rows = {
        line.split()[0]: [float(e) for e in line.split()[1:]]
        for line in capsys.readouterr().out.splitlines()[1:]
    }
    assert set(rows) == {"dL/dx", "dL/dgamma", "dL/dbeta"}
    # The attempt is off by more than the gradient itself, as the README says; sums of a few
    # hundred float64 terms, rounded differently, agree to about 1e-15.
    assert rows["dL/dx"][0] > 1 and rows["dL/dgamma"][0] > 1
    for _, correction, ours in rows.values():
        assert correction < 1e-13 and ours < 1e-13


def compatibility_rows() -> list[list[str]]:
    """The cells of every row of every table in docs/compatibility.md, without headings."""
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip()]


def test_compatibility_names_tests_that_exist() -> None:
    rows = compatibility_rows()
    assert len(rows) > 50
    for row in rows:
        assert len(row) == 6, row
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
        assert named or row[-1].startswith(("no", "x")), row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), row
