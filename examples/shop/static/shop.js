// An open page follows the visitor's session: what is in the cart, and whether it still is there.
(() => {
  const {cart} = document.currentScript.dataset;

  document.addEventListener("gsession:changed", async ({detail}) => {
    const shown = document.querySelector(".count");
    if (!shown || ![...detail.keys, ...detail.user].includes("cart")) return;
    const answer = await fetch(cart);
    if (!answer.ok) return;
    const {pieces} = await answer.json();
    shown.textContent = shown.dataset.count = pieces;
  });

  document.addEventListener("gsession:ended", () => {
    const again = document.createElement("a");
    again.href = location.href;
    again.textContent = "Load this page again";
    const message = document.createElement("p");
    message.className = "message warning";
    message.append("You are signed out, or your session has ended. ", again, ".");
    const messages = document.createElement("div");
    messages.className = "messages";
    messages.setAttribute("role", "status");
    messages.append(message);
    document.querySelectorAll("main .messages").forEach(old => old.remove());
    document.querySelector("main").prepend(messages);
  });
})();
