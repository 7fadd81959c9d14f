"""The docs page in a real browser, as an administrator uses it; and the document behind it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Response

from app.main import build_app
from app.permissions import ROLE_PERMISSIONS, Role
from tests.web.site import Site, browser, site  # noqa: F401  fixtures

# What a browser test needs once: a page that has rendered every operation.
OPERATIONS = ".opblock"


@dataclass
class Seen:
    """What went on behind the page."""

    page: Page
    urls: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture
def seen(site: Site, browser: Browser) -> Iterator[Seen]:  # noqa: F811
    """The docs page, open, in a profile of its own."""
    context = browser.new_context(viewport={"width": 1200, "height": 1400})
    seen = Seen(context.new_page())
    seen.page.on("request", lambda request: seen.urls.append(request.url))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on(
        "console",
        lambda message: seen.complaints.append(message.text) if message.type in ("error", "warning") else None,
    )
    # Violations that are reported only to the document, such as those of inline styles.
    seen.page.add_init_script(
        "document.addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))"
    )
    open_docs(seen.page, site)
    yield seen
    context.close()


def test_the_roles_are_in_a_table(seen: Seen) -> None:
    """Made from ROLE_PERMISSIONS: the page says what the code does."""
    info = seen.page.locator(".info")
    info.locator("summary").click()
    rows = [row.split("\t") for row in info.locator("tr").all_inner_texts()]
    roles = [cell.strip() for cell in rows[0][1:]]
    assert roles == list(Role)
    shown = {
        Role(role): {cells[0].strip() for cells in rows[1:] if cells[number].strip()}
        for number, role in enumerate(roles, 1)
    }
    assert shown == {role: {str(each) for each in permissions} for role, permissions in ROLE_PERMISSIONS.items()}


def open_docs(page: Page, site: Site) -> None:  # noqa: F811
    page.goto(f"{site.url}/docs")
    page.locator(OPERATIONS).first.wait_for()


def sign_in(page: Page, scheme: str, name: str, secret: str) -> None:
    """Through the *Authorize* dialog."""
    page.locator(".auth-wrapper .authorize").first.click()
    form = page.locator(".auth-container").filter(has_text=scheme)
    fields = form.locator("input")
    fields.nth(0).fill(name)
    fields.nth(1).fill(secret)
    form.get_by_role("button", name="Apply credentials").or_(form.locator("button.authorize")).first.click()
    form.get_by_text("Authorized").wait_for()
    page.locator(".close-modal").click()


def open_operation(page: Page, name: str) -> Locator:
    """Unfolded, ready to be filled in."""
    operation = page.locator(f"[id$=-{name}].opblock")
    operation.locator(".opblock-summary-control").click()
    operation.locator(".try-out__btn").click()
    return operation


def click_all(page: Page, selector: str) -> None:
    """At once: Playwright's own click waits until nothing moves, half a second each."""
    page.locator(selector).first.wait_for()
    page.locator(selector).evaluate_all("all => all.forEach(one => one.click())")


def execute(page: Page, operation: Locator) -> Response:
    with page.expect_response(lambda response: "/v1/" in response.url) as answer:
        operation.locator(".execute").click()
    operation.locator(".live-responses-table").wait_for()
    return answer.value


def create_the_example_account(page: Page) -> Response:
    """*Create an account* with everything as it is filled in."""
    return execute(page, open_operation(page, "create_user"))


def test_all_is_there_no_path_is_filled_in_and_nothing_comes_from_elsewhere(site: Site, seen: Seen) -> None:  # noqa: F811
    seen.page.set_default_timeout(300_000)  # all of it is drawn at once
    document = build_app().openapi()
    wanted = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    shown = seen.page.locator(OPERATIONS).evaluate_all("all => all.map(one => one.id)")
    assert {name.rpartition("-")[2] for name in shown} == wanted
    tags = seen.page.locator(".opblock-tag").evaluate_all("all => all.map(one => one.dataset.tag)")
    assert tags == [tag["name"] for tag in document["tags"]]
    in_path, filled = 0, set[str]()
    for tag in tags:  # one after another: each that is open is drawn anew at every click
        section = f"#operations-tag-{tag.replace(' ', '_')} + div"
        operations = seen.page.locator(f"{section} {OPERATIONS}").count()
        click_all(seen.page, f"{section} .opblock-summary-control")  # icons, examples and schemas are drawn only then
        seen.page.locator(".opblock.is-open .responses-table").nth(operations - 1).wait_for()
        click_all(seen.page, f"{section} .try-out__btn")
        seen.page.locator(f"{section} .execute").nth(operations - 1).wait_for()
        # Path parameters are empty until somebody writes what is meant: no DELETE by accident.
        fields = seen.page.locator("tr[data-param-in=path] input").evaluate_all("all => all.map(one => one.value)")
        assert set(fields) <= {""}
        in_path += len(fields)
        filled |= set(
            seen.page.locator("tr[data-param-in=header] input").evaluate_all("all => all.map(one => one.value)")
        )
        click_all(seen.page, f"{section} .opblock-summary-control")
        seen.page.locator(".opblock.is-open").first.wait_for(state="detached")
    assert in_path == sum(len(operations) * path.count("{") for path, operations in document["paths"].items())
    assert filled == {"", "wait=10"}
    assert [url for url in seen.urls if not url.startswith((f"{site.url}/", "data:"))] == []
    assert len(seen.urls) > 4
    assert seen.complaints == []


def test_the_listener_hears_a_violation(seen: Seen) -> None:
    seen.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color:red\">x</p>')")
    seen.page.evaluate("fetch('http://192.0.2.1/').catch(() => 0)")
    assert any("style-src" in complaint for complaint in seen.complaints)
    assert any("connect-src" in complaint for complaint in seen.complaints)


@pytest.mark.parametrize(("scheme", "prefix"), [("client_credentials", "Bearer "), ("basic", "Basic ")])
def test_authorize_works_and_is_forgotten(site: Site, seen: Seen, scheme: str, prefix: str) -> None:  # noqa: F811
    page = seen.page
    sign_in(page, scheme, site.client_id, site.secret)
    answer = execute(page, open_operation(page, "get_me"))
    assert answer.status == 200
    assert answer.json()["id"] == site.client_id
    assert answer.request.headers["authorization"].startswith(prefix)
    assert seen.complaints == []
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert json.loads(kept) == [{}, {}, ""]
    open_docs(page, site)
    answer = execute(page, open_operation(page, "get_me"))
    assert answer.status == 401
    assert "authorization" not in answer.request.headers
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_wrong_secret_is_said_in_the_dialog(site: Site, seen: Seen) -> None:  # noqa: F811
    page = seen.page
    page.locator(".auth-wrapper .authorize").first.click()
    form = page.locator(".auth-container").filter(has_text="client_credentials")
    form.locator("input").nth(0).fill(site.client_id)
    form.locator("input").nth(1).fill("wrong")
    form.locator("button.authorize").click()
    form.locator(".errors").filter(has_text="wrong, or the client is disabled").wait_for()


def test_the_example_account_is_made_as_it_stands_and_gets_ready(site: Site, seen: Seen) -> None:  # noqa: F811
    sign_in(seen.page, "basic", site.client_id, site.secret)
    answer = create_the_example_account(seen.page)
    assert answer.status == 201, answer.text()
    assert answer.json()["address"] == "alice@cacert.org"
    assert answer.json()["ready"] is True
    assert answer.json()["proofs"]["maildir"]["result"] == "ok"
    assert answer.json()["host"] == site.host


def test_the_page_is_served_under_a_strict_policy(site: Site) -> None:  # noqa: F811
    answer = httpx.get(f"{site.url}/docs")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "<script>" not in answer.text
    assert httpx.get(f"{site.url}/openapi.json").json() == build_app().openapi()


def operations() -> list[Any]:
    """Each operation of the document, by a name that a failure shows."""
    document = build_app().openapi()
    return [
        pytest.param(path, method, operation, id=operation["operationId"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


@pytest.mark.parametrize(("path", "method", "operation"), operations())
def test_each_operation_says_what_a_reader_needs(path: str, method: str, operation: dict[str, Any]) -> None:
    assert len(operation["summary"]) > 8
    description, _, needs = operation["description"].partition("\n\nNeeds ")
    assert len(description) > 20
    assert description != operation["summary"]
    assert len(operation["tags"]) == 1
    permission = operation.get("x-permission")
    if permission is None:
        assert "security" not in operation
    else:
        assert operation["security"] == [{"basic": []}, {"client_credentials": []}]
        assert {"401", "503"} <= operation["responses"].keys()
        assert ("403" in operation["responses"]) == (needs == f"`{permission}`.") == (permission != "any client")
    for parameter in operation.get("parameters", ()):
        assert parameter["description"], parameter["name"]
        assert "anyOf" not in parameter["schema"], parameter["name"]
        if parameter["in"] == "path":
            assert "422" in operation["responses"]
            assert not {"example", "examples", "default"} & (parameter.keys() | parameter["schema"].keys())
    if "{" in path and not path.startswith("/v1/addresses"):
        assert "404" in operation["responses"]
    if "application/json" in operation.get("requestBody", {}).get("content", {}):
        assert {"400", "413", "415", "422"} <= operation["responses"].keys()
    for status, response in operation["responses"].items():
        if int(status) >= 400 and path != "/oauth/token":
            assert response["content"].keys() == {"application/problem+json"}, status


def test_every_reference_leads_somewhere_and_no_operation_shares_a_name() -> None:
    document = build_app().openapi()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for name in schemas:
        assert f'"#/components/schemas/{name}"' in text, f"{name} is not used"
    assert {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]} <= schemas.keys()
    names = [operation.values[2]["operationId"] for operation in operations()]
    assert len(names) == len(set(names))
