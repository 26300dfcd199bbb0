import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_sdk_page_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/sdk.md", "exec"), {})


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken
