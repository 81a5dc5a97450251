// In the first frame, before anything is drawn, so that nothing flashes; and not sooner: a page from the disk that touches
// its storage while chromium still changes pages gets an empty one that loses what is written to it (chromium 156).
// Where there is no storage at all, the system decides.
requestAnimationFrame(() => {
  let kept = null;
  try { kept = localStorage.getItem("kvcycle-theme"); } catch (error) { /* no storage here */ }
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
});
