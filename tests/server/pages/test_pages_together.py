"""Several pages of one browser: they have one connection to the server, and agree on what is chosen and typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.launched import LONG_S
from tests.server.pages.conftest import expected, until
from tests.server.pages.served_page import ServedPage

Opener = Callable[..., Any]

TABS = 8
"""Two more than the connections of a browser to a server."""


def beside(page: Any, address: str) -> Any:
    """Another tab of the same browser."""
    other = page.context.new_page()
    other.set_default_timeout(1000 * LONG_S)
    other.goto(address)
    return other


@pytest.mark.slow
def test_eight_tabs_work_over_one_connection(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    jobs = [served.add_job() for _ in range(TABS)]
    first = open_page(f"#/jobs/{jobs[0].id}")
    pages = [first, *(beside(first, f"{served.address}#/jobs/{job.id}") for job in jobs[1:])]
    for page in pages:
        expected(page.get_by_role("button", name="Do not train")).to_have_count(1)
    for page, job in zip(pages, jobs, strict=True):
        served.do(lambda id=job.id: served.context.dispatcher.cancel(id, pause=True))  # type: ignore[misc]
        expected(page.get_by_text("It is paused.")).to_have_count(1)
    expected(pages[0].get_by_text("It is paused.")).to_have_count(1)
    until(lambda: served.streams == 1)
    for page in pages[1:]:
        page.close()
    served.do(lambda: served.context.dispatcher.proceed(jobs[0].id))
    expected(first.get_by_role("button", name="Pause")).to_have_count(1)


def test_without_shared_workers_a_page_has_its_own_connection(served: ServedPage, open_page: Opener) -> None:
    page = open_page("pages/icon.svg")
    page.context.add_init_script("delete window.SharedWorker")
    job = served.submit()
    page.goto(f"{served.address}#/jobs/{job.id}")
    expected(page.get_by_role("button", name="Pause")).to_have_count(1)
    served.do(lambda: served.context.dispatcher.cancel(job.id, pause=True))
    expected(page.get_by_text("It is paused.")).to_have_count(1)


SECOND_TOPICS = """async () => {
  const made = [];
  globalThis.EventSource = class {
    constructor(url) { this.url = String(url); made.push(this); }
    addEventListener() {}
    close() {}
  };
  const until = async (holds) => {
    for (let n = 0; n < 400 && !holds(); n++) await new Promise((next) => setTimeout(next, 5));
  };
  const { EventHub } = await import(new URL("pages/lib/event_hub.mjs", location.href));
  const hub = new EventHub(new URL("events", location.href).href);
  const received = [];
  const client = { send: ({ type }) => received.push(type) };
  hub.watch(client, []);
  await until(() => made.length === 1);
  hub.watch(client, ["runs/a"]);
  made[0].onopen();
  const early = received.length;
  await until(() => made.length === 2);
  made[1].onopen();
  return [early, received, new URL(made[1].url).search];
}"""


def test_topics_that_are_wanted_while_a_stream_opens_have_one_of_their_own(open_page: Opener) -> None:
    page = open_page()
    assert page.evaluate(SECOND_TOPICS) == [0, ["open"], "?topic=runs%2Fa"]


@pytest.mark.slow
def test_name_trigger_captions_and_photos_are_those_of_the_server(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    one = open_page("#/new/fox/photos")
    two = beside(one, f"{served.address}#/new/fox/photos")
    one.get_by_label("What will you call it in prompts?").fill("bello")
    expected(two.get_by_label("What will you call it in prompts?")).to_have_value("bello")
    two.get_by_label("Name of the LoRA").fill("my dog")
    expected(one.get_by_label("Name of the LoRA")).to_have_value("my dog")
    caption = one.get_by_label("Caption of fox_1.png")
    caption.fill("a fox asleep")
    caption.blur()
    expected(two.get_by_label("Caption of fox_1.png")).to_have_value("a fox asleep")
    two.locator('.tile[data-file="fox_3.png"]').click()
    two.keyboard.press("x")
    expected(one.locator(".tile")).to_have_count(3)

    elsewhere = one.context.browser.new_page()  # another browser, as of a phone
    elsewhere.goto(f"{served.address}#/new/fox/photos")
    expected(elsewhere.get_by_label("What will you call it in prompts?")).to_have_value("bello")
    elsewhere.close()


def test_what_two_pages_type_at_once_is_lost_in_neither(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    one = open_page("#/new/fox/photos")
    two = beside(one, f"{served.address}#/new/fox/photos")
    trigger, others = (
        one.get_by_label("What will you call it in prompts?"),
        two.get_by_label("What will you call it in prompts?"),
    )
    trigger.fill("bello")
    expected(others).to_have_value("bello")
    one.context.set_offline(True)
    trigger.fill("bello one")
    one.get_by_label("Name of the LoRA").fill("of one")
    served.draft("fox", trigger="bello two")
    one.context.set_offline(False)
    conflict = one.get_by_role("alert").filter(has_text="It was changed elsewhere")
    expected(conflict).to_contain_text("bello two")
    assert trigger.input_value() == "bello one"
    expected(two.get_by_label("Name of the LoRA")).to_have_value("of one")  # what only one has changed is merged
    expected(others).to_have_value("bello two")
    conflict.get_by_role("button", name="Keep mine").click()
    expected(others).to_have_value("bello one")
    expected(conflict).to_have_count(0)


@pytest.mark.slow
def test_drafts_of_earlier_pages_are_taken_over(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page("pages/icon.svg")
    stored = '{"name": "old", "trigger": "foxy", "isChosen": true}'
    page.evaluate("text => localStorage.setItem('lorasmith.draft.fox', text)", stored)
    page.goto(f"{served.address}#/new/fox/photos")
    expected(page.get_by_label("What will you call it in prompts?")).to_have_value("foxy")
    page.get_by_role("link", name="My LoRAs").click()
    page.go_back()
    expected(page.get_by_label("Name of the LoRA")).to_have_value("old")
    until(lambda: served.draft("fox").get("name") == "old")
    draft = served.draft("fox")
    assert (draft["name"], draft["trigger"], draft["is_chosen"]) == ("old", "foxy", True)
