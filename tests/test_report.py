"""The report: what it refuses, what it holds, and what a browser makes of it. All numbers here are made up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_evaluation, made_up_model, made_up_profile, made_up_tokens
from PIL import Image

from effvit.cli import main
from effvit.measure.records import read_results, write_records
from effvit.measure.values import Metrics
from effvit.show.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser to open the report in: apt-get install chromium (Debian) or chromium-browser"
)


def results(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(list(records)))
    return path


class TestRecords:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not a JSON file of results"),
            ("[NaN]", "NaN is not a number a page can read"),
            ("[]", "must hold a list of records, at least one, got list"),
            ('{"models": []}', "must hold a list of records, at least one, got dict"),
            ("[3]", r'record 0 must have "schema": 1 and "kind": \'profile\' or .* or \'metrics\', got 3'),
            ('[{"schema": 2, "kind": "profile"}]', r"got \{'schema': 2, 'kind': 'profile'\}; measure again"),
            ('[{"schema": 1, "kind": "sound"}]', r"got \{'schema': 1, 'kind': 'sound'\}"),
            ('[{"schema": 1, "kind": "profile", "models": []}]', "record 0 lacks conditions, machine; measure again"),
        ],
    )
    def test_file_of_another_form_is_refused(self, tmp_path, text, message):
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"results.json.*{message}"):
            read_results(path)

    def test_counts_of_an_evaluation_are_told_from_results(self, tmp_path):
        path = tmp_path / "results.json"
        path.write_text('{"state": 1, "groups": {}}')
        with pytest.raises(ValueError, match=r"results\.json keeps the counts of an evaluation that is not complete"):
            read_results(path)

    def test_what_test_and_doctor_write_is_shown(self, tmp_path, capsys):
        assert main(["doctor", "--json"]) == 0
        (tmp_path / "doctor.json").write_text(capsys.readouterr().out)
        metrics = Metrics("a config", None, {"coco/bbox_mAP": 0.25, "mIoU": None})
        write_records(tmp_path / "metrics.json", [metrics])
        page = tmp_path / "report.html"
        files = [tmp_path / "doctor.json", tmp_path / "metrics.json"]
        assert main(["report", *map(str, files), "--out", str(page)]) == 0
        text = page.read_text()
        assert '"config":"a config","checkpoint":null,"metrics":{"coco/bbox_mAP":0.25,"mIoU":null}' in text
        assert '"kind":"doctor"' in text

    def test_model_without_a_number_is_named(self, tmp_path):
        record = made_up_profile()
        del record["models"][1]["macs"], record["models"][1]["speedup"]
        with pytest.raises(ValueError, match=r"record 1, models 1 lacks macs, speedup"):
            read_results(results(tmp_path, made_up_profile(), record))

    def test_list_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r'"models" must be a list, got a dict'):
            read_results(results(tmp_path, made_up_profile(models={})))

    def test_picture_elsewhere_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r'"picture" must be a data URI of a PNG, JPEG.* got .*photo.png'):
            read_results(results(tmp_path, made_up_tokens(picture="photo.png")))

    def test_report_of_nothing_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="at least one file of results"):
            write_report([], tmp_path / "report.html")

    def test_error_is_one_line_of_the_command(self, tmp_path, capsys):
        assert main(["report", str(results(tmp_path, 3)), "--out", str(tmp_path / "report.html")]) == 2
        assert capsys.readouterr().err.startswith("effvit: error: ")
        assert not (tmp_path / "report.html").exists()


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.elements[-1][1].get("id")] = data


class TestPage:
    @pytest.fixture
    def page(self, tmp_path) -> str:
        out = tmp_path / "made" / "report.html"
        paths = [results(tmp_path, made_up_profile(), made_up_tokens())]
        write_report(paths, out)
        return out.read_text(encoding="utf-8")

    def test_elements_are_closed_and_data_comes_back(self, page):
        parsed = Elements(page)
        assert parsed.open == []
        assert json.loads(parsed.scripts["data"]) == [made_up_profile(), made_up_tokens()]

    def test_data_cannot_end_its_element(self, page):
        assert "a </script> processor" not in page
        assert page.count("</script>") == 2

    def test_page_needs_nothing_from_elsewhere(self, page):
        assert not re.search(r"https?:|@import|url\(", page)
        for tag, attributes in Elements(page).elements:
            assert tag not in ("link", "iframe", "img")
            assert "src" not in attributes

    def test_script_uses_only_elements_of_the_page(self, page):
        parsed = Elements(page)
        ids = {attributes["id"] for _, attributes in parsed.elements if "id" in attributes}
        named = re.findall(r"(?:byId|getElementById|select)\(\"([\w-]+)\"", parsed.scripts[None])
        assert named
        assert set(named) <= ids

    def test_command_writes_what_visualize_wrote(self, tmp_path, capsys):
        photo = tmp_path / "photo.png"
        Image.new("RGB", (64, 64), (90, 120, 30)).save(photo)
        tokens, page = tmp_path / "tokens.json", tmp_path / "report.html"
        command = ["visualize", str(photo), "--model", "deit_tiny_patch16_224", "--method", "tome"]
        assert main([*command, "--out", str(tmp_path), "--json", str(tokens)]) == 0
        assert main(["report", str(tokens), "--out", str(page)]) == 0
        assert str(page) in capsys.readouterr().out.replace("\n", "")
        (record,) = json.loads(Elements(page.read_text(encoding="utf-8")).scripts["data"])
        assert (record["model"], record["host"], record["name"]) == ("tome", "deit_tiny_patch16_224", "photo")


def browse(page: Path, *options: str, state: str = "") -> subprocess.CompletedProcess[str]:
    """Open the page in a headless browser."""
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"),
        f"--user-data-dir={page.parent / 'profile'}",
        *options,
        f"{page.as_uri()}{state}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def dom_of(page: Path, state: str = "", *options: str) -> str:
    """The page after its script ran; nothing may have been complained about on the console."""
    done = browse(page, "--dump-dom", *options, state=state)
    assert "CONSOLE" not in done.stderr
    return done.stdout


def with_script(page: Path, script: str) -> Path:
    """A copy of the page that runs the script at its end."""
    copy = page.with_name("scripted.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</script>\n</body>", f"{script}</script>\n</body>"), encoding="utf-8")
    return copy


def shown_rows(dom: str) -> list[str]:
    """Methods of the rows of the table, from top to bottom."""
    return re.findall(r'<tr data-method="(\w+)"', dom)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two hosts, two conditions, three methods and two pictures."""
    soft = made_up_tokens(method=None, host=None, model="soft_model", name="soft")
    soft["stages"] = [{"block": 0, "tokens": 2, "labels": [[0, 1]], "fused": [], "soft": True}]
    other = made_up_profile(models=[made_up_model("host_b", None, 1.0)])
    other["conditions"] = other["conditions"] | {"batch_size": 8}
    page = tmp_path_factory.mktemp("browser") / "report.html"
    write_report([results(page.parent, made_up_profile(), other, made_up_tokens(), soft)], page)
    return page


@needs_browser
class TestBrowser:
    def test_everything_is_shown_without_complaint(self, report):
        dom = dom_of(report)
        assert shown_rows(dom) == ["none", "evit", "tome", "none"]
        assert "1.80 (1.70–1.90)" in dom
        assert dom.count('class="card"') == dom.count('<p class="note">made up</p>') == 2
        assert 'class="front"' in dom
        assert "a &lt;/script&gt; processor" in dom

    def test_address_filters_by_method(self, report):
        dom = dom_of(report, "#method=evit")
        assert shown_rows(dom) == ["evit"]
        checked = re.findall(r'<input type="checkbox" name="method" value="(\w+)" checked', dom)
        assert checked == ["evit"]
        assert dom.count('<figure class="card" hidden') == 2

    def test_address_filters_by_host_and_condition(self, report):
        assert re.findall(r'data-host="(\w+)"', dom_of(report, "#host=host_b")) == ["host_b"]
        condition = "batch+4,+float32,+1+thread,+64+×+64,+2+pictures"
        assert shown_rows(dom_of(report, f"#condition={condition}")) == ["none", "evit", "tome"]

    def test_address_sorts_the_table(self, report):
        assert shown_rows(dom_of(report, "#sort=speed-up+down&host=host_a")) == ["evit", "tome", "none"]

    def test_unresolved_speedup_is_marked(self, report):
        (cell,) = re.findall(r'<td class="unresolved">([^<]*)', dom_of(report))
        assert cell == "1.05 (0.95–1.15)"

    def test_address_names_the_axes(self, report):
        dom = dom_of(report, "#x=macs&y=feature_distance")
        assert "GMACs of an image, less is better" in dom
        assert "distance of features from the dense ones, less is better" in dom

    def test_measured_accuracy_is_the_vertical_axis(self, tmp_path):
        record = made_up_profile()
        record["models"][1]["accuracy"] = {"value": 71.5, "metric": "top-1", "data": "a set", "origin": "made up"}
        page = tmp_path / "report.html"
        write_report([results(tmp_path, record)], page)
        dom = dom_of(page)
        assert "accuracy (%), more is better" in dom
        assert "71.5 (top-1, a set, made up)" in dom
        assert "2 of 3 models lack one of the two numbers" in dom

    def test_evaluations_stand_beside_published_figures(self, tmp_path):
        """The standard errors are sqrt(p (1 - p) / n): 1 point at 80 % of 1600 images, 1.08 at 75 %."""
        page = tmp_path / "report.html"
        write_report([results(tmp_path, made_up_evaluation())], page)
        dom = dom_of(page)
        assert "80.00 ± 1.00" in dom
        assert "75.00 ± 1.08" in dom
        assert "<td>76.50</td><td>-1.50</td>" in dom

    def test_each_of_many_methods_has_its_own_look(self, tmp_path):
        others = [made_up_model(f"method_{i}", f"method_{i}", 1.1 + i / 10) for i in range(13)]
        page = tmp_path / "report.html"
        write_report([results(tmp_path, made_up_profile(models=[made_up_model("host_a", None, 1.0), *others]))], page)
        marks = re.findall(r'<path class="point" d="(.*?)".*?style="fill: (.*?)"', dom_of(page).partition("lines")[0])
        assert len(set(marks)) == len(marks) == 14

    def test_weights_trained_otherwise_are_a_condition(self, tmp_path):
        tuned = made_up_profile()
        tuned["conditions"] = tuned["conditions"] | {"weights": "fine-tuned"}
        page = tmp_path / "report.html"
        write_report([results(tmp_path, made_up_profile(), tuned)], page)
        choices = re.findall(r'name="condition" value="(.*?)"', dom_of(page))
        assert [choice.endswith(", fine-tuned") for choice in choices] == [False, True]

    def test_focused_point_shows_its_numbers(self, report):
        dom = dom_of(with_script(report, "document.querySelectorAll('#pareto .point')[1].focus();"))
        tip = re.search(r'<div id="tip" role="status" style[^>]*>([^<]*)', dom).group(1)
        assert tip.startswith("evit keep_rate=0.5 in host_a\nbatch 4, float32")
        assert "images/s: 180.0" in tip

    def test_clicks_filter_sort_and_move_the_slider(self, report):
        clicks = """
        document.querySelector('input[value="evit"]').click();
        [...document.querySelectorAll("th button")].find((b) => b.textContent === "GMACs").click();
        byId("theme").click();
        setTimeout(() => {
          const slider = document.querySelector("input[type=range]");
          slider.value = 2;
          slider.dispatchEvent(new Event("input"));
          const canvas = slider.closest("figure").querySelector("canvas");
          const box = canvas.getBoundingClientRect();
          canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 2, clientY: box.top + 2 }));
          const pixels = canvas.getContext("2d").getImageData(0, 0, 32, 1).data;
          document.body.dataset.seen = [location.hash, slider.closest("figure").querySelector("output").value,
            pixels.slice(0, 3), pixels.slice(4 * 31, 4 * 31 + 3)].join(" | ");
        }, 500);
        """
        dom = dom_of(with_script(report, clicks))
        assert shown_rows(dom) == ["tome", "none", "none"]
        state, output, fused, dropped = re.search(r'data-seen="([^"]*)"', dom).group(1).split(" | ")
        assert state == "#method=none&amp;method=tome&amp;sort=GMACs+up&amp;theme=dark"
        assert output == "block 1: 2 tokens — patch (0, 3) dropped"
        # Grey 100 mixed with the tint as effvit.show.visualize does; the fused patch is dimmed beside the chosen ones.
        assert dropped == ",".join(str(round(0.34 * 100 + 0.66 * tint)) for tint in (120, 46, 40))
        assert fused == ",".join(str(round(0.35 * (0.38 * 100 + 0.62 * tint))) for tint in (96, 84, 152))

    def test_phone_does_not_scroll_sideways(self, report):
        script = "const { scrollWidth, clientWidth } = document.documentElement;"
        script += "parent.postMessage([innerWidth, scrollWidth - clientWidth], '*');"
        inside = with_script(report, script)
        phone = report.with_name("phone.html")  # a frame, since windows are at least 500 pixels wide
        phone.write_text(
            "<!doctype html><body><script>onmessage = (e) => { document.body.dataset.widths = e.data; }</script>"
            f'<iframe src="{inside.name}" style="border: 0; width: 360px; height: 800px"></iframe></body>'
        )
        width, hidden = re.search(r'data-widths="(\d+),(-?\d+)"', dom_of(phone)).groups()
        assert (width, hidden) == ("360", "0")

    def test_dark_page_is_dark(self, report):
        for theme, is_dark in (("dark", True), ("light", False)):
            shot = report.with_name(f"{theme}.png")
            browse(report, f"--screenshot={shot}", "--window-size=800,600", state=f"#theme={theme}")
            with Image.open(shot) as image:
                assert (sum(image.convert("RGB").getpixel((2, 2))) < 200) is is_dark

    def test_pictures_alone_make_a_report(self, tmp_path):
        page = tmp_path / "report.html"
        write_report([results(tmp_path, made_up_tokens())], page)
        dom = dom_of(page)
        assert dom.count('class="card"') == 1
        assert '<section id="trade-off" hidden' in dom
