"""/reset in a real browser, as an owner uses it: on a phone, by keyboard, with a link that is good or is not."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request

from tests.web.site import Site, browser, site  # noqa: F401  fixtures

GOOD = "seven green lanterns over the harbour"
PHONE = {"viewport": {"width": 320, "height": 568}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
NUMBERS = count()


@dataclass
class Owner:
    """An account, its link, and whoever opened that."""

    address: str
    link: str
    context: BrowserContext
    page: Page
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.page.goto(self.link)
        self.page.get_by_role("textbox", name="New password").wait_for()

    def set(self, password: str) -> None:
        self.page.get_by_role("textbox", name="New password").fill(password)
        self.page.get_by_role("button", name="Set the password").click()

    @property
    def problem(self) -> str:
        alert = self.page.get_by_role("alert")
        alert.filter(has_text=".").wait_for()
        return alert.inner_text()

    @property
    def title(self) -> str:
        """Of what came in place of the form; it has the focus, so that a screen reader reads on from there."""
        self.page.locator("#said:not([hidden])").wait_for()
        assert self.page.evaluate("document.activeElement.id") == "title"
        return self.page.get_by_role("heading", level=1).inner_text()

    @property
    def said(self) -> str:
        return self.page.locator("#said").inner_text()

    @property
    def token(self) -> str:
        return self.link.partition("#")[2]

    def sent(self) -> list[dict[str, Any]]:
        return [json.loads(request.post_data or "{}") for request in self.requests if request.method == "POST"]


def ask(site: Site, method: str, url: str, body: Any = None) -> dict[str, Any]:  # noqa: F811
    with httpx.Client(base_url=site.url, auth=(site.client_id, site.secret), timeout=30) as client:
        answer = client.request(method, url, json=body, headers={"Prefer": "wait=10"})
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found


def new_owner(site: Site, context: BrowserContext) -> Owner:  # noqa: F811
    address = f"owner{next(NUMBERS)}@cacert.org"
    ask(site, "POST", "/v1/users", {"address": address, "contact_address": "owner@elsewhere.test"})
    made = ask(site, "POST", "/v1/password-resets", {"user": address, "reason": "asked for it", "deliver": "show"})
    owner = Owner(address, made["link"], context, context.new_page())
    owner.page.on("request", lambda request: owner.requests.append(request))  # noqa: PLW0108  Playwright writes to it
    owner.page.on("pageerror", lambda error: owner.complaints.append(str(error)))
    owner.page.on(
        "console",
        lambda message: owner.complaints.append(message.text) if "Content Security" in message.text else None,
    )
    owner.page.add_init_script(
        "document.addEventListener('securitypolicyviolation', e => console.error('Content Security', e.violatedDirective))"
    )
    return owner


@pytest.fixture(params=["desktop", "phone"])
def owner(request: pytest.FixtureRequest, site: Site, browser: Browser) -> Iterator[Owner]:  # noqa: F811
    context = browser.new_context(**(PHONE if request.param == "phone" else {}))
    owner = new_owner(site, context)
    yield owner
    context.close()
    assert owner.complaints == []


@pytest.fixture
def at_a_desk(site: Site, browser: Browser) -> Iterator[Owner]:  # noqa: F811
    context = browser.new_context()
    yield new_owner(site, context)
    context.close()


def test_a_password_is_chosen_and_the_link_is_told_to_nobody_else(site: Site, owner: Owner) -> None:  # noqa: F811
    owner.open()
    page = owner.page
    assert page.url == f"{site.url}/reset"
    assert page.evaluate("history.length") <= 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    owner.set(GOOD)
    assert owner.title == "The new password is set"
    assert owner.address in owner.said
    assert "was signed out: sign in again" in owner.said
    assert owner.sent() == [{"token": owner.token, "password": GOOD, "revoke": []}]
    assert ask(site, "GET", f"/v1/users/{owner.address}")["has_password"] is True

    assert [request.url for request in owner.requests if not request.url.startswith((f"{site.url}/", "data:"))] == []
    for request in owner.requests:
        assert owner.token not in request.url.partition("#")[0]
        assert owner.token not in json.dumps(request.headers)
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert json.loads(kept) == [{}, {}, "", f"{site.url}/reset"]
    assert page.evaluate("document.getElementById('password').value") == ""
    page.reload()
    assert owner.title == "This link is not complete"


def test_by_keyboard_alone(at_a_desk: Owner) -> None:
    owner, page = at_a_desk, at_a_desk.page
    page.goto(owner.link)
    page.wait_for_function("document.activeElement.id === 'password'")
    keys = page.keyboard
    keys.type("short")
    keys.press("Enter")
    assert "at least 15" in owner.problem
    assert page.evaluate("document.activeElement.id") == "password"
    keys.press("Control+a")
    keys.type(GOOD)
    keys.press("Tab")
    keys.press("Space")
    assert page.locator("#password").get_attribute("type") == "text"
    assert page.get_by_role("button", name="Hide").get_attribute("aria-pressed") == "true"
    keys.press("Space")
    assert page.locator("#password").get_attribute("type") == "password"
    keys.press("Tab")
    keys.press("Space")
    assert page.get_by_role("checkbox", name="End my app passwords too").is_checked()
    keys.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    assert owner.title == "The new password is set"
    assert owner.sent()[0]["revoke"] == ["app_passwords"]


@pytest.mark.parametrize(
    ("password", "rule"),
    [("", "Write the new password"), ("x" * 14, "14 characters"), ("🔑" * 14, "14 characters")],
)
def test_one_that_is_too_short_is_not_even_sent(owner: Owner, password: str, rule: str) -> None:
    owner.open()
    owner.set(password)
    assert rule in owner.problem
    assert owner.sent() == []


def test_what_the_server_refuses_is_named_and_the_link_stays_good(owner: Owner) -> None:
    owner.open()
    field = owner.page.get_by_role("textbox", name="New password")
    for password, rule in (("passwordpassword", "attackers try first"), (owner.address * 2, "address")):
        owner.set(password)
        said = owner.problem
        assert rule in said
        assert len(said) > 20
        assert (field.get_attribute("aria-invalid"), field.get_attribute("aria-describedby")) == (
            "true",
            "problem rules",
        )
        field.fill("something else")
        assert owner.page.get_by_role("alert").inner_text() == ""
        assert field.get_attribute("aria-invalid") is None
    owner.set(GOOD)
    assert owner.title == "The new password is set"


def test_a_link_that_is_used_expired_or_none(site: Site, owner: Owner) -> None:  # noqa: F811
    owner.open()
    owner.set(GOOD)
    assert owner.title == "The new password is set"
    other = new_owner(site, owner.context)
    with sqlite3.connect(site.database_url.partition("///")[2]) as database:
        database.execute("UPDATE password_resets SET expires_at = '2026-01-01 00:00:00.000000' WHERE used_at IS NULL")
    for link in (owner.link, other.link, owner.link[:-3] + "abc"):
        owner.page.goto("about:blank")
        owner.page.goto(link)
        owner.set(GOOD)
        assert owner.title == "This link is not good any more"
        assert "Ask for a new one" in owner.said
        assert not owner.page.locator("#form").is_visible()


def test_without_a_token_there_is_no_form(site: Site, owner: Owner) -> None:  # noqa: F811
    owner.page.goto(f"{site.url}/reset")
    assert owner.title == "This link is not complete"
    assert not owner.page.locator("#form").is_visible()
    owner.page.goto(owner.link)  # In the same tab only the fragment is new.
    owner.set(GOOD)
    assert owner.title == "The new password is set"


def test_app_passwords_stay_or_end_as_chosen(site: Site, owner: Owner) -> None:  # noqa: F811
    made = {"name": "Phone <b>x</b>", "protocols": ["imap"]}
    ask(site, "POST", f"/v1/users/{owner.address}/app-passwords", made)
    owner.open()
    owner.set(GOOD)
    assert owner.title == "The new password is set"
    assert owner.page.locator("#said li").all_inner_texts() == ["Phone <b>x</b>"]
    again = ask(site, "POST", "/v1/password-resets", {"user": owner.address, "reason": "again", "deliver": "show"})
    owner.page.goto("about:blank")
    owner.page.goto(again["link"])
    owner.page.get_by_role("checkbox").check()
    owner.set(GOOD + " again")
    assert owner.title == "The new password is set"
    assert owner.page.locator("#said li").count() == 0
    left = ask(site, "GET", f"/v1/users/{owner.address}/app-passwords")
    assert left["items"] == []


def test_offline_it_says_so_and_goes_on(owner: Owner) -> None:
    owner.open()
    owner.context.set_offline(True)
    owner.set(GOOD)
    assert "no answer" in owner.problem
    owner.context.set_offline(False)
    owner.set(GOOD)
    assert owner.title == "The new password is set"


def test_a_password_manager_knows_the_field(owner: Owner) -> None:
    owner.open()
    field = owner.page.locator("#password")
    assert (field.get_attribute("autocomplete"), field.get_attribute("type")) == ("new-password", "password")
    assert field.get_attribute("name") is None, "so that no browser sends it by itself"


LUMINANCE = """
([one, two]) => {
  const light = (text) => {
    const part = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const [red, green, blue] = text.match(/[\\d.]+/g).map(Number);
    return 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  };
  const [dark, bright] = [light(one), light(two)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(site: Site, browser: Browser, scheme: Any) -> None:  # noqa: F811
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5 at least."""
    context = browser.new_context(color_scheme=scheme)
    owner = new_owner(site, context)
    owner.open()
    owner.set("short")
    assert owner.problem
    colour = "(selector, name) => getComputedStyle(document.querySelector(selector))[name]"
    paper = owner.page.evaluate(f"({colour})('body', 'backgroundColor')")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    for selector in ("h1", "#rules", "#problem", "#revoke-means", "#show"):
        ink = owner.page.evaluate(f"({colour})('{selector}', 'color')")
        assert owner.page.evaluate(LUMINANCE, [ink, paper]) >= 4.5, selector
    button = [owner.page.evaluate(f"({colour})('#send', '{name}')") for name in ("color", "backgroundColor")]
    assert owner.page.evaluate(LUMINANCE, button) >= 4.5
    context.close()


def test_it_is_served_under_a_strict_policy(site: Site) -> None:  # noqa: F811
    answer = httpx.get(f"{site.url}/reset")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert (answer.headers["cache-control"], answer.headers["referrer-policy"]) == ("no-store", "no-referrer")
    assert answer.text.count("<script") == answer.text.count('<script src="reset/page.js"')
    assert "MINIMUM" not in answer.text
    for part in ("innerHTML", "eval", "console", "localStorage"):
        assert part not in httpx.get(f"{site.url}/reset/page.js").text
