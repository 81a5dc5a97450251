"use strict";
(function () {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const one = (selector, from = document) => from.querySelector(selector);

  // Light and dark: the system's, until somebody presses the button.
  const button = one("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("kvcycle-theme", root.dataset.theme); } catch (error) { /* it lasts as long as the page */ }
  });
  system.addEventListener("change", name);
  new MutationObserver(name).observe(root, { attributeFilter: ["data-theme"] });
  name();

  // Bars: the arrow keys go from one to the next, Escape puts the figures away.
  all(".cols").forEach((cols) => {
    cols.addEventListener("keydown", (event) => {
      const bars = all(".col", cols);
      const at = bars.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") document.activeElement.blur();
      if (at < 0 || !step || !bars[at + step]) return;
      event.preventDefault();
      bars[at + step].focus();
    });
    // Whoever moves the pointer has left the keyboard; a page that scrolls under it moves nothing.
    cols.addEventListener("mousemove", (event) => {
      const focused = document.activeElement;
      const moved = event.movementX || event.movementY;
      if (moved && focused.matches(".col") && !focused.contains(event.target)) focused.blur();
    });
  });
  all(".to-limit").forEach((box) => box.addEventListener("change", () => {
    box.closest("figure").classList.toggle("scaled", box.checked);
  }));

  // A link to a check opens it; printing opens them all.
  const reveal = () => {
    let target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch (error) { return; }
    if (target && target.tagName === "DETAILS") { target.hidden = false; target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));

  // The checks: all or what did not pass, and those in which a word occurs.
  const filter = one(".filter");
  if (filter) {
    filter.hidden = false;
    const checks = all("details.check");
    const buttons = all("[data-show]", filter);
    const show = () => {
      const red = one('[data-show="red"]', filter).getAttribute("aria-pressed") === "true";
      const word = one("#find").value.trim().toLowerCase();
      let shown = 0;
      checks.forEach((check) => {
        const wanted = !(red && (check.classList.contains("pass") || check.classList.contains("not-run")));
        check.hidden = !(wanted && check.textContent.toLowerCase().includes(word));
        shown += check.hidden ? 0 : 1;
      });
      one("#found").textContent = `${shown} of ${checks.length} checks`;
    };
    buttons.forEach((pressed) => pressed.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === pressed)));
      show();
    }));
    one("#find").addEventListener("input", show);
    const opener = one("[data-open]", filter);
    opener.addEventListener("click", () => {
      const open = opener.getAttribute("aria-expanded") !== "true";
      checks.forEach((check) => { check.open = open; });
      opener.setAttribute("aria-expanded", String(open));
      opener.textContent = open ? "Close all" : "Open all";
    });
    show();
  }

  // The soak: pointing at a cycle, or moving the slider, reads every curve there.
  const data = one("#soak-data");
  if (data) {
    const plots = JSON.parse(data.textContent);
    const slider = one("#cycle");
    const last = Number(slider.max);
    const figures = all(".curve");
    const say = (value, unit) => {
      if (value === undefined) return "–";
      return unit === "B" ? `${value.toLocaleString("en-US")} B` : `${value.toFixed(3)} ${unit}`;
    };
    const point = (cycle) => {
      slider.value = cycle;
      one("#at-cycle").textContent = cycle.toLocaleString("en-US");
      figures.forEach((figure, index) => {
        const cross = one(".cross", figure);
        cross.hidden = false;
        cross.style.left = `${last > 1 ? ((cycle - 1) / (last - 1)) * 100 : 0}%`;
        plots[index].forEach((line, number) => {
          one(`[data-line="${number}"]`, figure).textContent = say(line.values[cycle - 1], line.unit);
        });
      });
    };
    one(".slide").hidden = false;
    slider.addEventListener("input", () => point(Number(slider.value)));
    all(".canvas").forEach((canvas) => canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      point(1 + Math.round(share * (last - 1)));
    }));
    point(last);
  }
})();
