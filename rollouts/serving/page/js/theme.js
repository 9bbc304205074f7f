// Runs before the page is painted, so that a chosen theme does not flash.
{
  let theme = "auto";
  try {
    theme = localStorage.getItem("rollouts.theme") || "auto";
  } catch {
    // Storage may be blocked; the system's theme will do.
  }
  document.documentElement.dataset.theme = ["light", "dark"].includes(theme) ? theme : "auto";
}
