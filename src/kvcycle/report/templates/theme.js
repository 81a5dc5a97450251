// Before anything is drawn, so that nothing flashes. A page opened from a disk may have no storage: then the system decides.
(function () {
  let kept = null;
  try { kept = localStorage.getItem("kvcycle-theme"); } catch (error) { /* no storage here */ }
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
})();
