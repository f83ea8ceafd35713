import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentclip.errors import UsageError
from latentclip.intervals import Metric, median, proportion
from latentclip.report import (
    Counts,
    Credit,
    Evaluation,
    Example,
    Gallery,
    Quality,
    Query,
    ReportData,
    Result,
    Stage,
    Training,
    build_report,
)
from latentclip.report.charts import bar
from latentclip.report.pictures import latent_preview, png_uri

SCRIPT = '<script>document.title = "owned"</script>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def picture(letter: str) -> str:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).text((30, 20), letter, fill="teal", font_size=48)
    return png_uri(image)


def report_data() -> ReportData:
    hits = np.arange(200) % 3 == 0
    metrics = {"image_to_text_r1": proportion(hits, 0.02), "image_to_text_median_rank": median(np.arange(1, 200), 100)}
    results = [Result(SCRIPT, False, 0.5, picture("a")), Result("a cat", True, 0.4, picture("b"))]
    preview = latent_preview(torch.rand(1, 8, 12, 12, generator=torch.Generator().manual_seed(0)))[0]
    queries = [Query("a cat", results, 2, picture("e")), Query("a dog", results[:1], 9, picture("f"))]
    steps = list(range(1000))
    return ReportData(
        title=f"A run & {SCRIPT}",
        headline="What it is.",
        figures=[("3,953", "pairs")],
        stages=[Stage("encode", "pairs to latents", 75.0, 3000), Stage("train", "latents to a model", 3700.0)],
        counts=[Counts("emoji", 10, 7, {"image_broken": 2}, filtered=1), Counts("photos", 10, 7)],
        quality=[
            Quality("emoji", 2, 0.25, 0.5, 3, 24.5, (23.0, f"00001{SCRIPT}"), (1.25, "00000"), ["00007"]),
            Quality("photos", 0, None, None, 0, None, None, None),
        ],
        examples=[Example(f"\u202egnp {SCRIPT}", picture("c"), png_uri(preview, 8), picture("d"), 24.61)],
        training=Training(steps, [5 - s / 500 for s in steps], [1e-3] * 1000, [14.0] * 1000, chance_loss=5.5),
        evaluations=[
            Evaluation("held out", "emoji", metrics),
            Evaluation("photos", "24 classes", {"top1": proportion(hits, 1 / 24)}),
        ],
        notes=["Style transfer is hard."],
        galleries=[
            Gallery("From image to caption", "", queries),
            Gallery("From caption to image", "", [Query(SCRIPT, results[:1], 57)]),
        ],
        config={"Versions": {"torch": "2.15.0"}},
        credits=[Credit("Twemoji", "CC BY 4.0", "https://github.com/jdecked/twemoji")],
        created="Today.",
    )


class Page(HTMLParser):
    """Collects what a page declares; raises for tags that do not close."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[tuple[str, str]]:
        return [(tag, attributes[name] or "") for tag, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def html() -> str:
    return build_report(report_data())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_well_formed(html: str, page: Page):
    assert html.startswith("<!doctype html>")
    assert page.open == []
    ids = [value for _, value in page.values("id")]
    assert len(ids) == len(set(ids))
    fragments = {value[1:] for _, value in page.values("href") + page.values("xlink:href") if value.startswith("#")}
    assert fragments <= set(ids)
    assert fragments >= {"metrics", "galleries", "pipeline", "counts", "examples", "quality", "training", "config"}
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]


def test_the_page_loads_nothing(html: str, page: Page):
    sources = page.values("src")
    assert len(sources) == 3 + 2 + 1  # an example, the queries that are images, the result that is one
    assert all(value.startswith("data:image/png;base64,") for _, value in sources)
    outside = [(tag, value) for name in ("href", "xlink:href", "action") for tag, value in page.values(name)]
    assert [pair for pair in outside if not pair[1].startswith("#")] == [("a", "https://github.com/jdecked/twemoji")]
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(values["content"] for tag, values in page.tags if "http-equiv" in values)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_captions_are_text_and_stay_apart(html: str, page: Page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(SCRIPT) >= 4
    assert "<bdi>\u202egnp" in html
    assert all(values.get("alt") for tag, values in page.tags if tag == "img")


def test_the_page_says_what_was_measured(page: Page):
    words = " ".join(page.text.split())
    for said in ("chance 2.0 %", "chance 100", "image broken 2", "decoded 24.6 dB", "40 images/s", "1 min 15 s"):
        assert said in words
    for said in ("1 h 01 min", "hit, rank 2", "miss, rank 57", "right: a dog", "999 steps", "Style transfer is hard."):
        assert said in words
    for said in ("emoji 2 25.00 % 50.00 % 3 24.5 dB least 23.0: 00001", "1.25 00000 00007", "photos 0 - - 0 - - none"):
        assert said in words.replace(SCRIPT, "").replace("\N{EN DASH}", "-")
    metric = report_data().evaluations[0].metrics["image_to_text_r1"]
    assert f"33.5 % {100 * metric.low:.1f}\N{EN DASH}{100 * metric.high:.1f} chance 2.0 %" in words


def test_counts_that_do_not_add_up_are_marked(html: str):
    assert html.count('<span class="chip bad">') == 1
    assert [counts.balanced for counts in report_data().counts] == [True, False]


def test_the_same_data_gives_the_same_page(html: str):
    assert build_report(report_data()) == html


def test_sections_may_be_left_out():
    page = Page(build_report(ReportData("Own data", "Metrics only.", evaluations=report_data().evaluations)))
    assert [value for tag, value in page.values("id") if tag == "section"] == ["metrics"]
    assert [value for _, value in page.values("href")] == ["#metrics"]
    assert Page(build_report(ReportData("Nothing yet", ""))).values("href") == []


def test_one_logged_step_can_be_drawn():
    assert "<svg" in build_report(ReportData("One step", "", training=Training([1], [5.0])))


def test_a_full_page_stays_small():
    noise = torch.rand(20, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    uris = [png_uri(image) for image in noise]
    queries = [Query("a cat", [Result("a cat", True, 0.5, uri) for uri in uris[:5]], 1) for _ in range(12)]
    steps = list(range(100_000))
    data = replace(
        report_data(),
        galleries=[Gallery("From caption to image", "", queries)],
        training=Training(steps, torch.rand(100_000).tolist()),
    )
    assert len(build_report(data).encode()) < 5_000_000


def test_what_would_load_from_elsewhere_is_refused():
    with pytest.raises(UsageError, match="no data URI"):
        build_report(ReportData("A run", "", examples=[Example("a cat", "https://example.org/cat.png")]))
    with pytest.raises(UsageError, match=r"not http\(s\)"):
        build_report(ReportData("A run", "", credits=[Credit("Art", "CC0", "javascript:alert(1)")]))


def test_bars_put_the_better_to_the_right():
    share = bar("top1", Metric(0.4, 0.3, 0.5, 0.1, 100))
    assert (share.low, share.high, share.value, share.chance) == (30, 50, 40, 10)
    rank = bar("image_to_text_median_rank", Metric(5, 3, 9, 50, 100))
    assert rank.chance < rank.low < rank.value < rank.high < 100
    assert bar("x_median_rank", Metric(1, 1, 1, 1, 1)).value == 100


def launch(profile: Path, *arguments: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --hide-scrollbars --allow-file-access-from-files"
    command = [str(CHROMIUM), *flags.split(), *more.split(), f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page(html: str, tmp_path: Path):
    report, log, shot = tmp_path / "report.html", tmp_path / "net.json", tmp_path / "shot.png"
    report.write_text(html, encoding="utf-8")
    dom = launch(tmp_path / "profile", f"--log-net-log={log}", "--dump-dom", report.as_uri())
    assert re.findall("<title>(.*)</title>", dom) == [escape(f"A run & {SCRIPT}", quote=False)]
    assert "script" not in {tag for tag, _ in Page(dom).tags}
    assert report.as_uri() in log.read_text()
    for host in re.findall(r"https?://([\w.]+)", html):
        assert host not in log.read_text()
    launch(tmp_path / "profile", "--window-size=1280,900", f"--screenshot={shot}", report.as_uri())
    with Image.open(shot) as image:
        assert image.size == (1280, 900)
        assert len(image.convert("RGB").getcolors(2**24)) > 50


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_sticks_out_of_the_window(html: str, tmp_path: Path, width: int):
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    measure = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe src="report.html" style="border: 0; width: {width}px; height: 640px" onload="{measure}"></iframe>'
    (tmp_path / "window.html").write_text(f"<title></title>{frame}")
    dom = launch(tmp_path / "profile", "--dump-dom", (tmp_path / "window.html").as_uri())
    assert re.findall("<title>(.*)</title>", dom) == [str(width)]
