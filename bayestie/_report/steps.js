"use strict";
// The page works without this: radio buttons and CSS choose the panel. With it, the rules in the figures
// and the row of the table follow the choice.
(function () {
  const picks = Array.from(document.querySelectorAll('input[name="strength"]'));
  if (picks.length === 0) return;
  const rules = Array.from(document.querySelectorAll("line.rule")).map(function (line) {
    return { line: line, xs: line.dataset.x.split(" ") };
  });

  function follow() {
    const step = picks.findIndex(function (pick) { return pick.checked; });
    for (const rule of rules) {
      rule.line.setAttribute("x1", rule.xs[step]);
      rule.line.setAttribute("x2", rule.xs[step]);
    }
  }

  function move(by) {
    const step = picks.findIndex(function (pick) { return pick.checked; });
    const next = picks[Math.min(picks.length - 1, Math.max(0, step + by))];
    next.checked = true;
    follow();
  }

  function button(text, label, by) {
    const element = document.createElement("button");
    element.type = "button";
    element.textContent = text;
    element.setAttribute("aria-label", label);
    element.addEventListener("click", function () { move(by); });
    return element;
  }

  const row = document.querySelector(".picks");
  row.prepend(button("‹", "Stronger sharing", -1));
  row.append(button("›", "Weaker sharing", 1));
  for (const pick of picks) pick.addEventListener("change", follow);
  document.documentElement.classList.add("scripted");
  follow();
})();
