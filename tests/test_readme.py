"""What the README shows is what happens."""

import doctest
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
