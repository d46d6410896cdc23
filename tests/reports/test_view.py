"""Pages are served to this machine and the token's holder alone; the page of tasks and the index are whole."""

import os
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import audit_samples
import pytest
from report_pages import Page, check_closed, check_tables

from safetyheads.errors import InputError
from safetyheads.reports.evaluation import render_evaluation
from safetyheads.reports.view import index_page, server
from safetyheads.reports.write import write_report


def test_a_page_is_given_to_its_own_address_and_nothing_else_is(tmp_path: Path) -> None:
    run = audit_samples.finished_run(tmp_path / "runs" / "one two", audit_samples.no_refusals())
    write_report(run)
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "runs" / "out").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "runs" / "history.html")
    made, address = server(tmp_path / "runs")
    thread = Thread(target=made.serve_forever, daemon=True)
    thread.start()
    parts = urlsplit(address)
    token, own = parts.path, f"localhost:{parts.port}"
    page = f"{token}one%20two/report/index.html"
    asked = [
        (token, {}, 200),
        (page, {}, 200),
        (page, {"Host": own}, 200),
        # Behind a tunnel the port is another.
        (page, {"Host": "127.0.0.1:9", "Origin": "http://127.0.0.1:9"}, 200),
        *((page, {"Host": name}, 403) for name in ("attacker.example", "[", "localhost:[")),
        ("//[", {}, 403),
        (page, {"Host": own, "Origin": "https://attacker.example"}, 403),
        (page, {"Host": own, "Sec-Fetch-Site": "cross-site"}, 403),
        ("/one%20two/report/index.html", {}, 403),
        ("/wrong/", {}, 403),
        (f"{token}../secret.html", {}, 404),
        (f"{token}%2e%2e/secret.html", {}, 404),
        (f"{token}out/runs/one%20two/report/index.html", {}, 404),
        (f"{token}one%20two/results.json", {}, 404),
        (f"{token}history.html", {}, 404),
    ]
    try:
        for target, headers, status in asked:
            connection = HTTPConnection("127.0.0.1", parts.port or 0, timeout=20)
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            assert answer.status == status, (target, headers)
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert (b"o refusals to lose" in answer.read()) == (status == 200)
            connection.close()
        connection = HTTPConnection("127.0.0.1", parts.port or 0, timeout=20)
        connection.request("POST", page, body="x")
        assert connection.getresponse().status == 501
        connection.close()
    finally:
        made.shutdown()
        made.server_close()
    with pytest.raises(InputError, match="no page below"):
        server(tmp_path / "runs" / "one two" / "shards")


def test_the_index_links_to_every_report(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_report(audit_samples.finished_run(tmp_path / name, audit_samples.no_refusals()))
    html = index_page(tmp_path)
    page = Page(html)
    check_tables(page)
    check_closed(page, ("a/report/index.html", "b/report/index.html"))
    assert page.words.index("a No refusals to lose") < page.words.index("b No refusals to lose")
    assert index_page(tmp_path) == html
    results = tmp_path / "a" / "results.json"
    results.write_text(results.read_text().replace("o refusals to lose", "othing to see"))
    assert "othing to see" not in index_page(tmp_path)  # what does not fit its checksum is not shown


def test_the_page_of_an_evaluation_has_every_metric_and_change() -> None:
    share = {"task": "arc", "metric": "acc", "value": 0.5, "interval": [0.4, 0.6], "n": 100, "unit": "share"}
    change = {"change": -0.1, "interval": [-0.2, -0.01], "n": 100, "gained": 2, "lost": 12, "p_value": 0.01}
    whole = dict.fromkeys(("interval", "gained", "lost", "p_value", "test", "p_holm")) | {"change": 3.0, "n": 9}
    perplexity = {"task": "wiki", "metric": "ppl", "value": 12.5, "interval": None, "n": 9, "unit": "whole"}
    metrics = [
        share | {"variant": "none", "difference": None},
        share | {"variant": "2-26", "value": 0.4, "difference": change | {"p_holm": 0.02, "test": "exact McNemar"}},
        perplexity | {"variant": "none", "difference": None},
        perplexity | {"variant": "2-26", "value": None, "difference": whole},
    ]
    model = {"name": "m<script>", "family": "llama", "n_layers": 2, "n_heads": 4, "n_parameters": 10}
    results = {"model": model, "ablation": {"name": "sc", "label": "scaling", "epsilon": 1e-5}, "groups": ["2-26"]}
    results |= {"settings": {"lm_eval": "0.4"}, "tasks": [], "metrics": metrics, "caveats": [], "warnings": []}
    page = Page(render_evaluation(results, {"config": {"seed": 0}}))
    check_tables(page)
    check_closed(page)
    assert all(said in page.words.replace("\xa0", " ") for said in ("−0.10 [−0.20, −0.01]", "m<script>", "+3.00"))
    assert [row["x"] for row in page.charts["changes"]["datasets"]["rows"]] == ["arc acc, 2-26"]
