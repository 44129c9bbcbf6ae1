// Asks the service Values for tests/sharing/test_values.py, as a service written in Node would.
// Arguments: HOST:PORT, the token of the service, and one JSON list [call, request] after another.
// Prints a JSON list of each answer, or of the name of its status.
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, token, proto, ...calls] = process.argv.slice(2);
const definition = loader.loadSync(path.resolve(proto), { longs: String, oneofs: true });
const { Values } = grpc.loadPackageDefinition(definition).flask_gsession.v1;
const client = new Values(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("authorization", `Bearer ${token}`);

const ask = ([name, request]) =>
  new Promise((resolve) => {
    const deadline = Date.now() + 10000;
    client[name](request, metadata, { deadline }, (error, reply) =>
      resolve(error ? grpc.status[error.code] : reply),
    );
  });

(async () => {
  const answers = [];
  for (const call of calls) answers.push(await ask(JSON.parse(call)));
  console.log(JSON.stringify(answers));
  client.close();
})();
