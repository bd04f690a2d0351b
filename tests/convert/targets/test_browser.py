"""The page in the README fills a mask in Chromium, with the words that the model itself finds."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megabert.convert import to_hf
from megabert.convert.targets import transformers_js
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.runs import REPOSITORY

README = REPOSITORY / "megabert/convert/README.md"


@pytest.fixture
def exported(checkpoint, tmp_path, skipped_checks, monkeypatch) -> Path:
    """An export for transformers.js; another test has its proof under Node.js."""
    monkeypatch.setattr(transformers_js, "find_node", lambda: None)
    to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=("onnx", "transformers.js")))
    monkeypatch.undo()
    return tmp_path / "hf"


@pytest.fixture
def site(exported, tmp_path) -> Path:
    """The page, with the packages that npm installs and a copy of the target's folder."""
    site = tmp_path / "site"
    shutil.copytree(exported / "transformers.js", site / "transformers.js")
    node = transformers_js.find_node()
    assert node is not None
    (site / "node_modules").symlink_to(node.modules)
    [page] = re.findall(r"```html\n(.*?)```", README.read_text(), re.DOTALL)
    (site / "fill.html").write_text(page)
    return site


@pytest.fixture
def address(site) -> Iterator[str]:
    """Serve the folder as `python -m http.server` does."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/fill.html"
        server.shutdown()
        thread.join()


@pytest.mark.browser
@pytest.mark.node
@pytest.mark.nightly
def test_the_page_in_the_readme_fills_a_mask(exported, address):
    from playwright.sync_api import sync_playwright

    text = "The [MASK] of a LIST\u03a3 is returned, Caf\u00e9."
    tokenizer, model = load_auto_tokenizer(exported), MegaBertForMaskedLM.from_pretrained(exported).eval()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0].softmax(dim=-1)
    best = scores.topk(5)
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, whom containers run as.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_function("!document.getElementById('fill').disabled", timeout=300_000)
        assert page.input_value("#text") == "Returns a [MASK] of the items."
        page.fill("#text", text)
        page.click("#fill")
        page.wait_for_function("document.getElementById('words').textContent", timeout=300_000)
        lines = page.text_content("#words").split("\n")
        browser.close()
    assert errors == []
    assert {url.split("/")[2] for url in requests if url.startswith("http")} == {address.split("/")[2]}
    words, values = zip(*(line.rsplit("  ", 1) for line in lines), strict=True)
    assert [word.strip() for word in words] == [str(tokenizer.decode([token])).strip() for token in best.indices]
    assert [float(value) for value in values] == pytest.approx(best.values.tolist(), abs=1e-4)
