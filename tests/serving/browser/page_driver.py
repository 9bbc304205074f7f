"""Driving the chat page as a person would, while noting all that it must not do."""

from __future__ import annotations

from typing import Any

# Runs before the page's own scripts, whatever the page's policy says.
NOTE = """
window.ran = [];
for (const name of ["alert", "confirm", "prompt", "print"]) window[name] = (what) => void ran.push(`${name} ${what}`);
window.violations = [];
addEventListener("securitypolicyviolation", (event) =>
  violations.push(`${event.effectiveDirective} ${event.blockedURI} ${event.sample}`));
"""


class Driver:
    """One page in a context of its own, and what it did: scripts that ran, outside requests, errors."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.url, self.outside, self.errors = url, [], []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **context})
        self.context.set_default_timeout(60_000)
        self.context.add_init_script(NOTE)
        self.context.route("**/*", self._note_request)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note_console)
        self.page.on("dialog", lambda dialog: (self.errors.append("a dialog"), dialog.dismiss()))
        self.context.on("page", lambda page: page is self.page or self.errors.append(f"a new page {page.url}"))
        self.load()

    def _note_request(self, route: Any) -> None:
        if route.request.url.startswith((self.url + "/", "blob:" + self.url)):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def _note_console(self, message: Any) -> None:
        expected = "Failed to load resource"  # a status of 400 or above, which the page shows by itself
        if message.type in ("error", "warning") and expected not in message.text:
            self.errors.append(message.text)

    def load(self) -> None:
        self.page.goto(self.url)
        self.page.locator("html[data-ready]").wait_for()

    def check(self) -> None:
        """Nothing happened that must not."""
        assert self.page.evaluate("window.ran") == []
        assert self.page.evaluate("window.violations") == []
        assert self.outside == []
        assert self.errors == []

    def close(self) -> None:
        self.context.close()

    def ask(self, text: str, wait: bool = True) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being generated and the last turn can be regenerated."""
        self.page.locator(".turn").last.get_by_label("Regenerate").last.wait_for()
        self.page.locator(".reply.live").first.wait_for(state="detached")

    @property
    def replies(self) -> list[str]:
        """The text of every reply, from the first."""
        return [text.strip() for text in self.page.locator(".reply-body").all_inner_texts()]

    def set(self, **settings: object) -> None:
        """Fill fields of the settings sheet by their ids."""
        self.page.click("#settings-button")
        for name, value in settings.items():
            self.page.fill(f"#{name.replace('__', '-')}", str(value))
        self.page.locator("#settings").get_by_label("Close").click()

    def choose_models(self, *names: str) -> None:
        self.page.click("#models summary")
        for choice in self.page.locator(".choice").all():
            choice.locator("input").set_checked(choice.inner_text() in names)
        self.page.keyboard.press("Escape")

    @property
    def titles(self) -> list[str]:
        return self.page.locator(".conversation").all_inner_texts()
