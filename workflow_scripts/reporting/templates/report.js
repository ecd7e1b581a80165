const root = document.documentElement, toggle = document.getElementById('theme');
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
const dark = () => (root.dataset.theme ? root.dataset.theme === 'dark' : prefersDark.matches);
const label = () => { toggle.textContent = dark() ? 'Light colours' : 'Dark colours'; };
try { root.dataset.theme = localStorage.getItem('theme') || ''; } catch (error) { root.dataset.theme = ''; }
toggle.hidden = false;
toggle.addEventListener('click', () => {
  root.dataset.theme = dark() ? 'light' : 'dark';
  try { localStorage.setItem('theme', root.dataset.theme); } catch (error) { /* not remembered, then */ }
  label();
});
prefersDark.addEventListener('change', label);
label();

// Every picture is in the file once, however many policies have judged it.
const pictures = JSON.parse(document.getElementById('pictures').textContent);
for (const image of document.querySelectorAll('img[data-picture]')) image.src = pictures[image.dataset.picture];

const form = document.getElementById('filters'), count = document.getElementById('count');
const cards = [...document.querySelectorAll('.card')];
const filter = () => {
  const wanted = [...new FormData(form)].filter(([, value]) => value);
  let shown = 0;
  for (const card of cards) {
    card.hidden = !wanted.every(([name, value]) => card.dataset[name] === value);
    shown += !card.hidden;
  }
  count.textContent = `${shown} of ${cards.length} shown`;
};
if (form) {
  form.addEventListener('change', filter);
  form.addEventListener('reset', () => setTimeout(filter));
  form.addEventListener('submit', (event) => event.preventDefault());
  // A link to a card that is filtered out shows everything again.
  addEventListener('hashchange', () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.hidden) { form.reset(); setTimeout(() => target.scrollIntoView()); }
  });
  filter();
}
