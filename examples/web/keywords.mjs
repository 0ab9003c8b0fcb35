// The words of a question that guide the selection, where nobody names them.

const STOP_WORDS = new Set(
  ("a about above after all also am an and any are aren't as at be because been before being below between both but by " +
    "can can't could couldn't describe did didn't do does doesn't doing don't down during each few for from further had " +
    "has have having he her here hers him his how i if in into is isn't it its just kind let's look looks made make many " +
    "me more most much my no nor not now of off on once only or other our out over own please same see seen she should " +
    "show shown so some such tell than that the their them then there these they this those through to too under until " +
    "up very was wasn't we were weren't what when where which while who whom whose why will with would you your").split(" "),
);

/** The content words of a question, which guide the selection unless others are named. */
export function contentWords(question) {
  const words = question.match(/[\p{L}\p{N}_]+(?:['’-][\p{L}\p{N}_]+)*/gu) ?? [];
  const content = words.filter((word) => !STOP_WORDS.has(word.toLowerCase().replace("’", "'")));
  return [...new Set(content)];
}
