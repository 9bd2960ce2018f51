"""Settings: later sources win, unknown names and wrong values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.errors import SettingsError
from headrace.settings import Settings


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text('lane = "file"\nlease_s = 7\nmax_attempts = 9\n')
    environ = {
        "HEADRACE_CONFIG": str(file),
        "HEADRACE_LANE": "environ",
        "HEADRACE_LEASE_S": "8.5",
        "HOME": "x",
    }
    settings = Settings.load({"lane": "flag", "redis": None}, environ)
    assert (settings.lane, settings.lease_s, settings.max_attempts) == ("flag", 8.5, 9)
    assert settings.redis == Settings().redis


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lanes = 1", "unknown setting lanes"),
        ("lease_s = 'soon'", "lease_s: 'soon' is not a float"),
        ("lease_s = true", "lease_s: True is not a float"),
        ("max_attempts = 0", "max_attempts 0 must be above 0"),
        ("lane =", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "h.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ={"HEADRACE_CONFIG": str(file)})
    assert words in str(caught.value)


def test_a_misspelt_variable_and_a_missing_file_are_refused() -> None:
    with pytest.raises(SettingsError, match="unknown variable HEADRACE_LAME"):
        Settings.load(environ={"HEADRACE_LAME": "x"})
    with pytest.raises(SettingsError, match="does not exist"):
        Settings.load(environ={"HEADRACE_CONFIG": "/nowhere.toml"})
    with pytest.raises(SettingsError, match="allow_volatile: 'maybe' is not a bool"):
        Settings.load(environ={"HEADRACE_ALLOW_VOLATILE": "maybe"})
