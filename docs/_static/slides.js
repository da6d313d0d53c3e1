// The arrow keys, the space bar and the keys of a presenter turn the slides; on paper answers are open.
const slides = [document.querySelector("h1"), ...document.querySelectorAll("main > section > section")];

addEventListener("keydown", event => {
  const turn = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 }[event.key];
  if (!turn || event.target.closest("summary, a")) return;
  event.preventDefault();
  const at = slides.findLastIndex(slide => slide.getBoundingClientRect().top < 10);
  slides[Math.max(0, Math.min(slides.length - 1, Math.max(at, 0) + turn))].scrollIntoView();
});

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(answer => answer.open = true));
