"""Where the scripts write: what cannot be written is refused in a line, before the work."""

import sys

import pytest

from scripts import damage, layouts, maintainer_figures


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        (layouts, "--keep", "name a folder that can be written, or one that can be made"),
        (maintainer_figures, "--json", "allowed is a file in a directory that is there"),
        (damage, "--page", "allowed is a Markdown page that is there"),
    ],
)
@pytest.mark.parametrize("place", ["/dev/null/x", "file/x/y"])
def test_a_place_below_a_file_is_refused(script, option, message, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", option, place])
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert option in said and place in said and message in said
